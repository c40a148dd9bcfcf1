//! The network of this host as one thing: open it, say what should be, move ports, remove everything.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Mutex;

use crate::dns::Responder;
use crate::error::NetworkError;
use crate::firewall::{self, Rules};
use crate::link_name::{self, PortRecord};
use crate::netlink::{Link, Netlink};
use crate::state::{Divert, Moving, State};
use crate::sysctl;
use crate::types::{EnvironmentNetwork, HostNetworkConfig, Mac, refuse_collisions};

/// The network of this host. Clones share one state.
///
/// # A move, in calls
///
/// ```text
///  source                                   destination
///  prepare_divert(mac, vni)                 apply(.. the environment, with the source among its remotes ..)
///                                           park(&port)              nothing is held up by this yet
///  freeze
///  divert(mac, vni, to: destination)        frames now cross to the destination and wait there, whoever sent them
///  mute(id)                                 nothing leaves any more: sockets can be copied from here on
///  unplug(id)                               attach(&port, pid), plug(id)     out is open, in waits
///                                           parking.deliver()        once the sockets exist
///  detach(id)
///  on failure: plug(id) undoes the divert   parking.cancel(), detach(id)
/// ```
///
/// Hosts that are told late keep sending to the source, and the source sends their frames on while it diverts.
#[derive(Clone)]
pub struct HostNetwork {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub config: HostNetworkConfig,
    pub netlink: Netlink,
    pub state: Mutex<State>,
    pub moving: Moving,
    /// Held while forwarding entries are compared and written, and by a step that must not fall in the middle of that.
    pub ways: Mutex<()>,
}

impl HostNetwork {
    /// Takes over the network namespace of the calling process, inside a tokio runtime. Turns on IPv4 forwarding,
    /// which stays on. Changes nothing else yet: what an earlier process left is adopted or removed by the first
    /// [`HostNetwork::apply`].
    pub async fn open(config: HostNetworkConfig) -> Result<Self, NetworkError> {
        let netlink = Netlink::open()?;
        sysctl::set("ipv4/ip_forward", "1")?;
        let inner =
            Inner { config, netlink, state: Mutex::default(), moving: Moving::default(), ways: Mutex::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes this host's networks exactly `wanted`: links, addresses, forwarding entries, rules, names. Networks and
    /// ports of ours that belong to none of them are removed. Applying the same again changes nothing.
    ///
    /// Goes on after an error and returns all of them. An environment whose description is refused keeps what it has.
    pub async fn apply(&self, wanted: &[EnvironmentNetwork]) -> Vec<NetworkError> {
        let mut state = self.inner.state.lock().await;
        let mut errors = Vec::new();
        let links = self.inner.netlink.links().await.unwrap_or_else(|error| {
            errors.push(error);
            Vec::new()
        });
        let attached = ports(&links).map(|(port, _)| (port.vni, port.mac)).collect();
        state.environments = self.accept(wanted, &state.environments, &attached, &mut errors);
        self.inner.moving.lock().settle(&state.environments, &attached, Instant::now());

        // A refused network keeps what it has, also one that never was accepted by this process.
        let named = wanted.iter().chain(&state.environments);
        let keep: BTreeSet<u32> = named.map(|environment| environment.vni).collect();

        match firewall::tables().await {
            Ok(tables) if tables.len() == firewall::TABLES.len() => {}
            Ok(_) => state.firewall = None,
            Err(error) => errors.push(error),
        }
        self.sync_firewall(&mut state).await.unwrap_or_else(|error| errors.push(error));
        state.responders.retain(|vni, _| keep.contains(vni));
        self.remove_strangers(&keep, &mut errors).await;
        let State { environments, responders, .. } = &mut *state;
        for environment in environments.iter() {
            match self.apply_overlay(environment).await {
                Ok(()) => {
                    let serving = responders.get(&environment.vni).filter(|responder| responder.serves(environment));
                    if let Some(responder) = serving {
                        responder.update(environment);
                        continue;
                    }
                    responders.remove(&environment.vni);
                    match Responder::start(environment, &self.inner.config.resolvers) {
                        Ok(responder) => drop(responders.insert(environment.vni, responder)),
                        Err(error) => errors.push(error),
                    }
                }
                Err(error) => errors.push(error),
            }
        }
        errors
    }

    /// Of `wanted` what can be carried out. For what is refused, and for what is missing but has a move under way, its
    /// previous description if that still fits.
    fn accept(
        &self,
        wanted: &[EnvironmentNetwork],
        previous: &[EnvironmentNetwork],
        attached: &BTreeSet<(u32, Mac)>,
        errors: &mut Vec<NetworkError>,
    ) -> Vec<EnvironmentNetwork> {
        let refused = refuse_collisions(wanted);
        let bad: BTreeSet<usize> = refused.iter().map(|(index, _)| *index).collect();
        let good = wanted.iter().enumerate().filter(|(index, _)| !bad.contains(index));
        let mut candidates: Vec<EnvironmentNetwork> = good.map(|(_, environment)| environment.clone()).collect();
        for (index, reason) in refused {
            errors.push(reason.into());
            let vni = wanted[index].vni;
            candidates.extend(previous.iter().find(|environment| environment.vni == vni).cloned());
        }
        let needed = self.inner.moving.lock().needed(attached);
        let missing = |vni: u32| needed.contains(&vni) && !wanted.iter().any(|environment| environment.vni == vni);
        candidates.extend(previous.iter().filter(|environment| missing(environment.vni)).cloned());
        let colliding: BTreeSet<usize> = refuse_collisions(&candidates).into_iter().map(|(index, _)| index).collect();
        let kept = candidates.into_iter().enumerate().filter(|(index, _)| !colliding.contains(index));
        kept.map(|(_, environment)| environment).collect()
    }

    /// Removes links of ours that belong to no network in `keep`, and taps and half-made ports nobody works on.
    async fn remove_strangers(&self, keep: &BTreeSet<u32>, errors: &mut Vec<NetworkError>) {
        let links = match self.inner.netlink.links().await {
            Ok(links) => links,
            Err(error) => return errors.push(error),
        };
        let steps = self.inner.moving.snapshot();
        for link in links.iter().filter(|link| link_name::is_ours(&link.name)) {
            let wanted = match link.name.split_at(3) {
                // Also while a parking ends: frames are on their way to it until its thread says otherwise.
                ("gwt", id) => steps.parked.contains_key(id),
                ("gwp", id) => match PortRecord::read(&link.name, &link.alias) {
                    Some(record) => keep.contains(&record.vni),
                    None => steps.attaching.contains(id),
                },
                _ => link_name::vni_of(&link.name).is_some_and(|vni| keep.contains(&vni)),
            };
            if !wanted {
                self.inner.netlink.delete(link).await.unwrap_or_else(|error| errors.push(error));
            }
        }
    }

    /// Makes the rules match what is known now; runs nft only if they change.
    pub(crate) async fn sync_firewall(&self, state: &mut State) -> Result<(), NetworkError> {
        let links = self.inner.netlink.links().await?;
        let steps = self.inner.moving.snapshot();
        // A parked port that is attached already would be in both lists.
        let ports: Vec<PortRecord> =
            ports(&links).map(|(port, _)| port).filter(|port| !steps.holds(&port.id)).collect();
        let parked: Vec<PortRecord> = steps.holding().cloned().collect();
        let passed_on = steps.diverted.iter().filter(|(_, divert)| divert.passes_on);
        let diverted: Vec<(u32, Mac)> = passed_on.map(|(key, _)| *key).collect();
        let config = &self.inner.config;
        let rules = Rules {
            tunnel_address: config.tunnel_address,
            uplink: config.uplink.as_deref(),
            environments: &state.environments,
            protected: &state.protected,
            ports: &ports,
            parked: &parked,
            diverted: &diverted,
        };
        let nothing = state.environments.is_empty() && ports.is_empty() && parked.is_empty();
        let text = if nothing { String::new() } else { rules.render() };
        if state.firewall.as_ref() == Some(&text) {
            return Ok(());
        }
        state.firewall = None;
        if nothing {
            firewall::remove().await?
        } else {
            firewall::replace(&text).await?
        }
        state.firewall = Some(text);
        Ok(())
    }

    /// Addresses of the installation itself (hosts, controller) that containers may reach on published ports only. In
    /// force with the next [`HostNetwork::apply`].
    pub async fn protect(&self, addresses: BTreeSet<Ipv4Addr>) {
        self.inner.state.lock().await.protected = addresses;
    }

    /// Gets ready to send frames of this container on to another host: `nft` is run now and not while the container
    /// is frozen. Call before the freeze, on the host the container is on. Changes no path yet; undone by
    /// [`HostNetwork::plug`].
    pub async fn prepare_divert(&self, mac: Mac, vni: u32) -> Result<(), NetworkError> {
        {
            let mut steps = self.inner.moving.lock();
            let said = steps.described.get(&(vni, mac)).copied();
            let divert = steps.diverted.entry((vni, mac)).or_insert(Divert { said, ..Divert::default() });
            divert.passes_on = true;
        }
        let mut state = self.inner.state.lock().await;
        self.sync_firewall(&mut state).await?;
        self.set_vxlan_mode(vni).await
    }

    /// From now on frames for `mac` go to the host with tunnel address `to`, whatever an older description says.
    ///
    /// On the host the container is on: those of local senders and those of hosts that still think the container is
    /// here. Undone by [`HostNetwork::plug`]; holds while the port is attached, and ends by itself with an apply one
    /// minute after the first that said the container is elsewhere and found no port of it here.
    ///
    /// On any other host: those of local senders, until an apply says something new about the container. Undone by
    /// another divert to where the description says it is.
    pub async fn divert(&self, mac: Mac, vni: u32, to: Ipv4Addr) -> Result<(), NetworkError> {
        let prepared = self.inner.moving.lock().diverted.get(&(vni, mac)).is_some_and(|divert| divert.passes_on);
        if !prepared {
            let links = self.inner.netlink.links().await?;
            if ports(&links).any(|(port, _)| (port.vni, port.mac) == (vni, mac)) {
                self.prepare_divert(mac, vni).await?;
            }
        }
        let vxlan = self.inner.netlink.existing(&link_name::vxlan(vni)).await?;
        self.inner.moving.lock().begin_divert((vni, mac), to);
        self.inner.netlink.forward_to_host(&vxlan, mac, to).await
    }

    /// Names of everything of ours in this network namespace: links, and nftables tables as `table FAMILY NAME`.
    pub async fn leftovers(&self) -> Result<Vec<String>, NetworkError> {
        let links = self.inner.netlink.links().await?;
        let mut names: Vec<String> = links.into_iter().map(|link| link.name).collect();
        names.retain(|name| link_name::is_ours(name));
        names.extend(firewall::tables().await?.into_iter().map(|table| format!("table {table}")));
        names.sort_unstable();
        Ok(names)
    }

    /// Removes everything of ours in this network namespace, whoever made it. Goes on after an error and returns all.
    pub async fn remove_all(&self) -> Vec<NetworkError> {
        let mut state = self.inner.state.lock().await;
        let mut errors = Vec::new();
        *state = State::default();
        self.inner.moving.lock().diverted.clear();
        match self.inner.netlink.links().await {
            Ok(links) => {
                for link in links.iter().filter(|link| link_name::is_ours(&link.name)) {
                    self.inner.netlink.delete(link).await.unwrap_or_else(|error| errors.push(error));
                }
            }
            Err(error) => errors.push(error),
        }
        firewall::remove().await.unwrap_or_else(|error| errors.push(error));
        errors
    }
}

/// Ports of containers among `links`, plugged in or not.
pub(crate) fn ports(links: &[Link]) -> impl Iterator<Item = (PortRecord, &Link)> {
    links.iter().filter_map(|link| Some((PortRecord::read(&link.name, &link.alias)?, link)))
}
