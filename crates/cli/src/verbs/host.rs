//! `godwit host list|show|evacuate|cordon|activate|declare-dead`.

pub mod evacuate;

use anyhow::Result;
use clap::Subcommand;
use godwit_api::client::Client;
use godwit_api::types::{ActivateRequest, HostView};
use godwit_model::HostName;
use godwit_model::host::HostState;
use godwit_plan::ZONE_LABEL;

use self::evacuate::EvacuateArgs;
use super::DONE;
use crate::failure::Failure;
use crate::human;
use crate::printer::Printer;
use crate::table::{pairs, table};

#[derive(Debug, Subcommand)]
pub enum HostVerb {
    /// List hosts
    #[command(visible_alias = "ls")]
    List,
    /// Show everything about a host
    Show {
        /// As `godwit host list` shows it
        host: HostName,
    },
    /// Move everything off a host, so that it may be switched off
    Evacuate(EvacuateArgs),
    /// Let a host keep what it has and take nothing new; ends an evacuation
    Cordon {
        /// As `godwit host list` shows it
        host: HostName,
    },
    /// Let a host take containers again; ends an evacuation
    Activate {
        /// As `godwit host list` shows it
        host: HostName,
        /// Move what the last evacuation moved away here again
        #[arg(long)]
        bring_back: bool,
    },
    /// Say that a silent host is dead for certain: what it had starts elsewhere at once
    ///
    /// A host that is lost is found out without this, 15 seconds after its last word, because its containers stand still by
    /// themselves by then. This is for hosts of which that is not known. If it is not true, two copies run.
    DeclareDead {
        /// As `godwit host list` shows it
        host: HostName,
    },
}

pub async fn run(client: &Client, printer: &Printer, verb: HostVerb) -> Result<u8> {
    match verb {
        HostVerb::List => {
            let hosts = client.hosts().await?;
            printer.value(&hosts, |hosts| list(printer, hosts))?;
            if hosts.is_empty() {
                printer.say("no host has joined yet; `godwit agent --help` tells how");
            }
        }
        HostVerb::Show { host } => {
            let hosts = client.hosts().await?;
            let names: Vec<&str> = hosts.iter().map(|h| h.name.as_str()).collect();
            let Some(view) = hosts.iter().find(|h| h.name == host) else {
                let hint = match names.as_slice() {
                    [] => "no host has joined yet".to_owned(),
                    names => format!("there are: {}", names.join(", ")),
                };
                return Err(Failure::new(format!("there is no host {host}")).hint(hint).into());
            };
            printer.value(view, |view| show(printer, view))?;
        }
        HostVerb::Evacuate(args) => return evacuate::run(client, printer, args).await,
        HostVerb::Cordon { host } => {
            let view = client.cordon(&host).await?;
            printer.say(format_args!("{host} takes no new containers"));
            json_only(printer, &view)?;
        }
        HostVerb::Activate { host, bring_back } => {
            let view = client.activate(&host, &ActivateRequest { bring_back }).await?;
            printer.say(format_args!("{host} takes containers again"));
            json_only(printer, &view)?;
        }
        HostVerb::DeclareDead { host } => {
            let view = client.declare_dead(&host).await?;
            printer.say(format_args!("what {host} had is started elsewhere"));
            json_only(printer, &view)?;
        }
    }
    Ok(DONE)
}

/// What a verb changed is data for programs; a person has been told.
fn json_only(printer: &Printer, view: &HostView) -> Result<()> {
    if printer.is_json() { printer.json(view) } else { Ok(()) }
}

fn state(host: &HostView) -> &'static str {
    match (host.connected, host.state) {
        (false, HostState::Failed | HostState::Suspect) => host.state.as_str(),
        (false, _) => "disconnected",
        (true, state) => state.as_str(),
    }
}

fn seen(host: &HostView) -> String {
    match host.last_seen_ms {
        Some(at) if !host.connected => format!("{} ago", human::since(at)),
        Some(_) => "now".to_owned(),
        None => "never".to_owned(),
    }
}

fn list(printer: &Printer, hosts: &[HostView]) -> String {
    // Eighty columns are not enough for both.
    let zones = hosts.iter().any(|h| zone(h).is_some());
    let kernel_or_zone = if zones { "ZONE" } else { "KERNEL" };
    let head = ["HOST", "STATE", "CONTAINERS", "CPU", "MEMORY", kernel_or_zone, "CRIU", "SEEN"];
    let rows = hosts.iter().map(|h| {
        vec![
            h.name.to_string(),
            state(h).to_owned(),
            h.containers.to_string(),
            format!("{}/{}", h.reserved_cpu, h.facts.cpus),
            format!("{}/{}", h.reserved_memory, h.facts.memory),
            if zones { human::or_dash(zone(h)) } else { kernel(&h.facts.kernel).to_owned() },
            h.facts.criu.clone().unwrap_or_else(|| "none".to_owned()),
            seen(h),
        ]
    });
    table(printer, &head, rows)
}

fn zone(host: &HostView) -> Option<&String> {
    host.facts.labels.get(ZONE_LABEL)
}

/// `6.12.41` of `6.12.41+deb13-amd64`: a table has little room.
fn kernel(full: &str) -> &str {
    full.split(|c: char| !(c.is_ascii_digit() || c == '.')).next().unwrap_or(full)
}

fn labels(host: &HostView) -> String {
    let labels: Vec<String> = host.facts.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    if labels.is_empty() { human::NOTHING.to_owned() } else { labels.join(", ") }
}

fn show(printer: &Printer, host: &HostView) -> String {
    let facts = &host.facts;
    let rows = [
        ("host", host.name.to_string()),
        ("state", state(host).to_owned()),
        ("last seen", seen(host)),
        ("may still run", host.may_run.clone().unwrap_or_else(|| human::NOTHING.to_owned())),
        ("labels", labels(host)),
        ("containers", host.containers.to_string()),
        ("evacuation", evacuate::told(host)),
        ("cloudlets", host.cloudlets.to_string()),
        ("memory", format!("{} of {} reserved", host.reserved_memory, facts.memory)),
        ("cpu", format!("{} of {} reserved, {} MHz", host.reserved_cpu, facts.cpus, facts.cpu_mhz)),
        ("disk free", facts.disk_free.to_string()),
        ("processor", format!("{} ({})", facts.cpu_model, facts.architecture)),
        ("kernel", facts.kernel.clone()),
        ("criu", facts.criu.clone().unwrap_or_else(|| "none: its containers cannot move".to_owned())),
        ("written pages", facts.written_pages.to_string()),
        ("tunnel address", facts.tunnel_address.to_string()),
        ("migration address", facts.migration_address.to_string()),
        ("certificate", format!("sha256:{}", facts.certificate_sha256)),
        ("godwit", facts.godwit_version.clone()),
    ];
    pairs(printer, rows)
}
