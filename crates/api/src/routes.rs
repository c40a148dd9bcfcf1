//! The routes, one name each, so that server and client cannot differ.
//!
//! | route | method | body → answer |
//! |---|---|---|
//! | `/v1/version` | GET | [`crate::types::VersionView`] |
//! | `/v1/hosts` | GET | list of [`crate::types::HostView`] |
//! | `/v1/hosts/{host}/evacuate` | POST | [`crate::types::EvacuateRequest`] → [`crate::types::EvacuateAnswer`] |
//! | `/v1/hosts/{host}/cordon` | POST | [`crate::types::HostView`] |
//! | `/v1/hosts/{host}/activate` | POST | [`crate::types::ActivateRequest`] → [`crate::types::HostView`] |
//! | `/v1/hosts/{host}/declare-dead` | POST | [`crate::types::HostView`] |
//! | `/v1/balance` | GET, PUT | [`crate::types::BalanceChange`] → [`crate::types::BalanceView`] |
//! | `/v1/balance/now` | POST | [`crate::types::BalanceAnswer`] |
//! | `/v1/environments` | GET | list of [`crate::types::EnvironmentView`] |
//! | `/v1/environments/{env}` | GET, PUT, DELETE | [`crate::types::ApplyRequest`] → [`crate::types::ApplyAnswer`] |
//! | `/v1/containers?env=` | GET | list of [`crate::types::ContainerView`] |
//! | `/v1/containers/{env}/{local}` | GET, DELETE | [`crate::types::ContainerView`] |
//! | `/v1/containers/{env}/{local}/stop`, `…/start` | POST | [`crate::types::ContainerView`] |
//! | `/v1/containers/{env}/{local}/placement` | GET | [`crate::types::PlacementView`] |
//! | `/v1/containers/{env}/{local}/plan-move` | POST | [`crate::types::MigrateRequest`] → [`crate::types::MovePlan`] |
//! | `/v1/containers/{env}/{local}/migrate` | POST | [`crate::types::MigrateRequest`] → `Move` |
//! | `/v1/containers/{env}/{local}/logs?follow=&tail=` | GET | lines of [`crate::session::LogLine`] as JSON, one each line |
//! | `/v1/containers/{env}/{local}/exec` | GET, upgraded to a WebSocket | see [`crate::session`] |
//! | `/v1/plans/fail/{host}` | GET | [`godwit_plan::RecoveryPlan`] |
//! | `/v1/plans/rebalance` | GET | [`godwit_plan::Advice`] |
//! | `/v1/moves`, `/v1/moves/{id}` | GET | `Move` |
//! | `/v1/moves/{id}/watch` | GET | lines of `Move` as JSON until it is over |
//! | `/v1/moves/{id}/cancel` | POST | `Move` |
//! | `/v1/events?since=&follow=` | GET | lines of `Event` as JSON |
//!
//! Agents only, on the TLS listener: `/v1/agent/join` (POST), `/v1/agent/link` and `/v1/agent/sessions/{id}`
//! (WebSockets). Errors of every route are [`crate::types::ErrorBody`] with a fitting status code.

use godwit_model::{ContainerName, EnvName, HostName, MoveId};

pub const VERSION: &str = "/v1/version";
pub const HOSTS: &str = "/v1/hosts";
pub const BALANCE: &str = "/v1/balance";
pub const BALANCE_NOW: &str = "/v1/balance/now";
pub const ENVIRONMENTS: &str = "/v1/environments";
pub const CONTAINERS: &str = "/v1/containers";
pub const MOVES: &str = "/v1/moves";
pub const PLAN_FAIL: &str = "/v1/plans/fail";
pub const PLAN_REBALANCE: &str = "/v1/plans/rebalance";
pub const EVENTS: &str = "/v1/events";
pub const AGENT_JOIN: &str = "/v1/agent/join";
pub const AGENT_LINK: &str = "/v1/agent/link";
pub const AGENT_SESSIONS: &str = "/v1/agent/sessions";

/// `verb` is one of `evacuate`, `cordon`, `activate`, `declare-dead`.
pub fn host_verb(name: &HostName, verb: &str) -> String {
    format!("{HOSTS}/{name}/{verb}")
}

pub fn plan_fail(host: &HostName) -> String {
    format!("{PLAN_FAIL}/{host}")
}

pub fn environment(name: &EnvName) -> String {
    format!("{ENVIRONMENTS}/{name}")
}

pub fn container(name: &ContainerName) -> String {
    format!("{CONTAINERS}/{}/{}", name.env, name.local())
}

/// `verb` is one of `stop`, `start`, `placement`, `plan-move`, `migrate`, `logs`, `exec`.
pub fn container_verb(name: &ContainerName, verb: &str) -> String {
    format!("{}/{verb}", container(name))
}

pub fn r#move(id: &MoveId) -> String {
    format!("{MOVES}/{id}")
}
