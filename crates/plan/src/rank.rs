//! What speaks for a host, as parts that are compared one after the other.

use std::cmp::Ordering;
use std::fmt;

use godwit_model::{Bytes, MilliCpu};
use serde::{Deserialize, Serialize};

use crate::draft::Draft;
use crate::fleet::{HostId, is_spread};
use crate::rules::Ask;

/// What speaks for one host, for one container. The parts are compared in this order; the first that differs decides,
/// and the host's name where none does. Up to `image_missing` less is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Score {
    /// Containers of the layer on the host.
    pub of_layer: u32,
    /// Containers of the environment on the host.
    pub of_environment: u32,
    /// Containers of the layer in the host's zone.
    pub of_layer_in_zone: u32,
    /// The fullest of reserved memory, reserved CPU, measured memory and measured CPU, in tenths.
    pub load_tenths: u8,
    /// It would use memory that is kept free for the loss of any one host.
    pub uses_reserve: bool,
    /// Its image would have to be fetched.
    pub image_missing: bool,
    /// Bytes free beyond what is kept for the loss of a host; more is better.
    pub room_bytes: i64,
    /// Thousandths of a core that may still be reserved; more is better.
    pub cpu_free: u64,
}

impl Score {
    fn key(&self) -> impl Ord {
        (
            (self.of_layer, self.of_environment, self.of_layer_in_zone),
            (self.load_tenths, self.uses_reserve, self.image_missing),
            std::cmp::Reverse((self.room_bytes, self.cpu_free)),
        )
    }
}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Smaller is better.
impl Ord for Score {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpu = MilliCpu(self.cpu_free.min(u64::from(u32::MAX)) as u32);
        write!(
            f,
            "layer {}, environment {}, layer in zone {}, load {}/10, reserve {}, image {}, room {}, CPU {cpu}",
            self.of_layer,
            self.of_environment,
            self.of_layer_in_zone,
            self.load_tenths,
            if self.uses_reserve { "used" } else { "kept" },
            if self.image_missing { "missing" } else { "there" },
            room(self.room_bytes),
        )
    }
}

fn room(bytes: i64) -> String {
    let sign = if bytes < 0 { "-" } else { "" };
    format!("{sign}{}", Bytes(bytes.unsigned_abs()))
}

impl Draft<'_> {
    pub fn score(&self, id: HostId, ask: &Ask<'_>) -> Score {
        let slot = self.slot(id);
        let occupied = self.occupied(id);
        let spread = is_spread(ask.container.spread);
        let layer = ask.ties.layer.filter(|_| spread);
        let env = ask.ties.env.filter(|_| spread);
        let room_bytes = self.fleet.room(slot, occupied);
        Score {
            of_layer: layer.map_or(0, |layer| self.of_layer(id, layer, ask.own)),
            of_environment: env.map_or(0, |env| self.of_env(id, env, ask.own)),
            of_layer_in_zone: layer.map_or(0, |layer| self.of_zone(slot.zone, layer, ask.own)),
            load_tenths: slot.load(occupied),
            uses_reserve: i128::from(room_bytes) < i128::from(ask.memory),
            image_missing: self.image_missing(id, ask),
            room_bytes,
            cpu_free: slot.cpu_free(occupied),
        }
    }

    /// An image that came with a draft's move is not counted: it goes where its container goes.
    fn image_missing(&self, id: HostId, ask: &Ask<'_>) -> bool {
        let there = |image| self.slot(id).images.contains_key(&image);
        !ask.container.image.is_empty() && !ask.ties.image.is_some_and(there)
    }
}
