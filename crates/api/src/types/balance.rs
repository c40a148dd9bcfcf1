//! Balancing containers over hosts: what is asked and told.

use godwit_model::{ContainerName, HostName};
use godwit_plan::{Advice, Policy};
use serde::{Deserialize, Serialize};

/// What becomes of moves that would make the fleet better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceMode {
    /// Nothing is looked for.
    Off,
    /// They are told.
    #[default]
    Advise,
    /// They are told and made.
    Automatic,
}

impl BalanceMode {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Advise => "advise",
            Self::Automatic => "automatic",
        }
    }
}

/// What shall be different; what is `None` stays. Fields as in [`Policy`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BalanceChange {
    pub mode: Option<BalanceMode>,
    pub cpu_threshold_permille: Option<u16>,
    pub memory_threshold_permille: Option<u16>,
    pub hold_ms: Option<u64>,
    pub level_permille: Option<u16>,
    pub least_gain_permille: Option<u16>,
    pub rest_ms: Option<u64>,
    /// Moves at the same time.
    pub at_once: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalanceView {
    pub mode: BalanceMode,
    pub policy: Policy,
    /// Moves at the same time.
    pub at_once: u32,
    /// What would make the fleet better now, with gain and cost, in the order in which it can be done.
    pub advice: Advice,
    /// Why nothing is advised now, where something else comes first.
    pub waits: Option<String>,
    /// Moves for balance that are under way.
    pub under_way: u32,
    /// Containers still to be moved because a person asked to carry out the advice; `None`: nobody did.
    pub once: Option<Vec<ContainerName>>,
    /// In order of names.
    pub hosts: Vec<LoadView>,
}

/// What the containers of a host use, as measured, in thousandths of what it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadView {
    pub host: HostName,
    pub cpu_permille: u16,
    pub memory_permille: u16,
    /// For how long that has been too much, in milliseconds.
    pub overloaded_ms: Option<u64>,
}

/// The advice that is being carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalanceAnswer {
    pub advice: Advice,
    /// Events with a greater number tell how it goes on.
    pub since: u64,
}
