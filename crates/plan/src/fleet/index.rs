//! Hosts in the order in which they are wanted, so that a decision looks at few of them.
//!
//! The order is of what a host is by itself: load, room, free CPU, name. What also depends on who asks (how many of
//! its layer are there) concerns the few hosts that have containers of its environment; those are looked at one by
//! one. Hosts that take nothing are not in here.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_model::HostName;

use super::{HostId, ImageId, ZoneId};

/// Smaller is wanted more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    /// Tenths.
    pub load: u8,
    /// Bytes beyond what is kept for the loss of a host.
    pub room: Reverse<i64>,
    pub cpu_free: Reverse<u64>,
    pub name: Arc<HostName>,
    pub id: HostId,
}

type Order = BTreeSet<Key>;

#[derive(Debug, Clone, Default)]
pub(crate) struct Index {
    zones: Vec<Order>,
    /// Of each image, the hosts that have it.
    images: Vec<BTreeMap<ZoneId, Order>>,
}

impl Index {
    pub fn insert(&mut self, zone: ZoneId, images: impl Iterator<Item = ImageId>, key: &Key) {
        for image in images {
            self.insert_image(zone, image, key);
        }
        slot(&mut self.zones, zone.at()).insert(key.clone());
    }

    pub fn remove(&mut self, zone: ZoneId, images: impl Iterator<Item = ImageId>, key: &Key) {
        for image in images {
            self.remove_image(zone, image, key);
        }
        slot(&mut self.zones, zone.at()).remove(key);
    }

    pub fn insert_image(&mut self, zone: ZoneId, image: ImageId, key: &Key) {
        slot(&mut self.images, image.at()).entry(zone).or_default().insert(key.clone());
    }

    pub fn remove_image(&mut self, zone: ZoneId, image: ImageId, key: &Key) {
        let orders = slot(&mut self.images, image.at());
        if let Some(order) = orders.get_mut(&zone) {
            order.remove(key);
            if order.is_empty() {
                orders.remove(&zone);
            }
        }
    }

    /// The hosts of a zone, most wanted first.
    pub fn of_zone(&self, zone: ZoneId) -> impl Iterator<Item = &Key> {
        self.zones.get(zone.at()).into_iter().flatten()
    }

    /// Those of them that have the image.
    pub fn of_zone_with(&self, zone: ZoneId, image: ImageId) -> impl Iterator<Item = &Key> {
        self.images.get(image.at()).and_then(|orders| orders.get(&zone)).into_iter().flatten()
    }

    /// Zones with at least one host in here.
    pub fn zones(&self) -> impl Iterator<Item = ZoneId> {
        self.zones.iter().enumerate().filter(|(_, order)| !order.is_empty()).map(|(at, _)| ZoneId::of(at))
    }
}

/// The element, which is made if it is not there.
pub(super) fn slot<T: Default>(list: &mut Vec<T>, at: usize) -> &mut T {
    if list.len() <= at {
        list.resize_with(at + 1, T::default);
    }
    &mut list[at]
}
