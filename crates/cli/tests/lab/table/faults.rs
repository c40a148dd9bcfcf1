//! The faults: which can hit which phase, and what may become of the container then.

use super::{Outcome, Phase};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    SourceAgent,
    DestinationAgent,
    Controller,
    SourceKeeper,
    DestinationKeeper,
    SourceCriu,
    DestinationCriu,
    Cut,
    SourceCut,
    Blip,
    Disk,
    Memory,
    Cancel,
    Clock,
}

/// Why a fault cannot hit a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    NotThere,
    OneClock,
}

impl Why {
    pub const ALL: [Self; 2] = [Self::NotThere, Self::OneClock];

    pub fn mark(self) -> &'static str {
        match self {
            Self::NotThere => "a",
            Self::OneClock => "b",
        }
    }

    pub fn explained(self) -> &'static str {
        match self {
            Self::NotThere => "nothing of that is at work in this phase, or the host has no part in it any more",
            Self::OneClock => {
                "n/a: the hosts of a lab have one wall clock, the machine's (time namespaces do not have it), and a test \
                 does not set that; moves count time by monotonic clocks and never compare two hosts'"
            }
        }
    }
}

/// One cell of each phase, and each fault at least once where its phase is short.
pub const REPRESENTATIVE: [(Phase, Fault); 10] = [
    (Phase::Prepare, Fault::Cancel),
    (Phase::Copy, Fault::SourceAgent),
    (Phase::Freeze, Fault::SourceKeeper),
    (Phase::Dump, Fault::SourceCriu),
    (Phase::Restore, Fault::DestinationCriu),
    (Phase::Restore, Fault::Cancel),
    (Phase::HandOver, Fault::Controller),
    (Phase::Activate, Fault::DestinationAgent),
    (Phase::Fill, Fault::Controller),
    (Phase::Release, Fault::SourceAgent),
];

impl Fault {
    pub const ALL: [Self; 14] = [
        Self::SourceAgent,
        Self::DestinationAgent,
        Self::Controller,
        Self::SourceKeeper,
        Self::DestinationKeeper,
        Self::SourceCriu,
        Self::DestinationCriu,
        Self::Cut,
        Self::SourceCut,
        Self::Blip,
        Self::Disk,
        Self::Memory,
        Self::Cancel,
        Self::Clock,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::SourceAgent => "src-agent",
            Self::DestinationAgent => "dst-agent",
            Self::Controller => "controller",
            Self::SourceKeeper => "src-keeper",
            Self::DestinationKeeper => "dst-keeper",
            Self::SourceCriu => "src-criu",
            Self::DestinationCriu => "dst-criu",
            Self::Cut => "cut",
            Self::SourceCut => "src-cut",
            Self::Blip => "blip",
            Self::Disk => "disk-full",
            Self::Memory => "no-memory",
            Self::Cancel => "cancel",
            Self::Clock => "clock",
        }
    }

    pub fn explained(self) -> &'static str {
        match self {
            Self::SourceAgent => "the source's agent is killed and started again",
            Self::DestinationAgent => "the destination's agent is killed and started again",
            Self::Controller => "the controller is killed and started again",
            Self::SourceKeeper => "the container's keeper at the source is killed, and with it what runs there",
            Self::DestinationKeeper => "the arriving container's keeper is killed, and with it what is restored there",
            Self::SourceCriu => "the CRIU that dumps is killed",
            Self::DestinationCriu => "the CRIU that restores is killed",
            Self::Cut => "the destination's link is cut until people are told the truth, then healed",
            Self::SourceCut => "the source's link is cut until people are told the truth, then healed",
            Self::Blip => "the destination's link is cut for a second and healed",
            Self::Disk => "the destination's disk is full (from the freeze on the agent's part of it only)",
            Self::Memory => "the destination runs out of memory: the kernel ends whom it likes there",
            Self::Cancel => "somebody cancels the move (after the hand-over: and is refused)",
            Self::Clock => "the wall clock jumps",
        }
    }

    /// More than ten seconds.
    pub fn takes_long(self) -> bool {
        matches!(self, Self::Cut | Self::SourceCut)
    }

    pub fn cannot_hit(self, phase: Phase) -> Option<Why> {
        let hits = match self {
            Self::SourceAgent | Self::SourceKeeper | Self::SourceCut => phase != Phase::Fill,
            Self::DestinationKeeper => phase >= Phase::Restore,
            Self::SourceCriu => matches!(phase, Phase::Freeze | Phase::Dump),
            Self::DestinationCriu => matches!(phase, Phase::Restore | Phase::HandOver | Phase::Activate),
            Self::Clock => return Some(Why::OneClock),
            _ => true,
        };
        (!hits).then_some(Why::NotThere)
    }

    /// What may become of the container.
    pub fn allows(self, phase: Phase) -> &'static [Outcome] {
        use Outcome::{Anew, Back, Moved};
        // The store names the destination from the hand-over on; the point in that phase is just before.
        let before = phase < Phase::HandOver;
        match self {
            Self::SourceAgent if phase == Phase::Prepare => &[Back, Moved],
            // It has given everything away: it is not needed any more.
            Self::SourceAgent if phase >= Phase::Restore => &[Moved],
            Self::SourceAgent => &[Back],
            Self::SourceKeeper if phase >= Phase::Restore => &[Moved],
            Self::SourceKeeper => &[Anew],
            Self::DestinationKeeper | Self::DestinationCriu if before => &[Back],
            Self::DestinationKeeper | Self::DestinationCriu => &[Anew],
            Self::SourceCriu if phase == Phase::Dump => &[Outcome::Torn],
            Self::SourceCriu => &[Back],
            Self::Controller | Self::Cancel if phase <= Phase::HandOver => &[Back],
            Self::DestinationAgent | Self::Cut if before => &[Back],
            Self::Blip if before => &[Back, Moved],
            Self::SourceCut if phase < Phase::Restore => &[Back],
            Self::Disk if phase == Phase::Copy => &[Back],
            Self::Disk if before => &[Back, Moved],
            Self::Memory if before => &[Back, Moved],
            Self::Memory => &[Moved, Anew],
            _ => &[Moved],
        }
    }
}
