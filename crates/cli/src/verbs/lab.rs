//! `godwit lab …`: many hosts on this machine.

mod demo;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use godwit_api::client::{Address, Client};
use godwit_lab::{BitsPerSecond, Lab, LabName, LabSpec, Node};
use godwit_model::{Bytes, MilliCpu};
use serde::Serialize;

use super::DONE;
use crate::args::Global;
use crate::failure::Failure;
use crate::human;
use crate::printer::Printer;
use crate::table::table;

/// What a lab is called where nothing else is said.
const DEFAULT_NAME: &str = "lab";

#[derive(Debug, Subcommand)]
pub enum LabVerb {
    /// Make hosts, links, a controller and an agent on each host
    Up(UpArgs),
    /// Show it: three hosts, and Redis, PostgreSQL and nginx moved around them while clients use them
    Demo(demo::DemoArgs),
    /// Remove a lab, whatever state it is in
    Down {
        #[command(flatten)]
        which: Which,
        /// Every lab on this machine
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// List labs
    #[command(visible_alias = "ls")]
    List,
    /// Run a program on a lab host: h1, h2, …, ctl or client
    Exec {
        #[command(flatten)]
        which: Which,
        /// h1, h2, …, ctl or client
        node: Node,
        /// The program and its arguments
        #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// kill -9 the agent of a host, or the controller (ctl)
    Kill(OneNode),
    /// Start an agent or the controller that was killed
    Start(OneNode),
    /// Cut a host's link
    Cut(OneNode),
    /// Join a host's link again
    Restore(OneNode),
    /// Change the rate of a host's link
    Rate {
        #[command(flatten)]
        one: OneNode,
        /// For example 10gbit or 100mbit; without it as fast as the machine is
        rate: Option<BitsPerSecond>,
    },
}

#[derive(Debug, Args)]
pub struct Which {
    /// The lab's name; not needed where there is only one, or a new one shall be called lab
    #[arg(long, value_name = "NAME")]
    name: Option<LabName>,
}

#[derive(Debug, Args)]
pub struct OneNode {
    #[command(flatten)]
    which: Which,
    /// h1, h2, …, ctl or client
    node: Node,
}

#[derive(Debug, Args)]
pub struct UpArgs {
    #[command(flatten)]
    which: Which,
    /// How many hosts
    #[arg(long, default_value_t = 3, value_name = "N")]
    hosts: u32,
    /// Memory of each host, for example 4GiB; without it the machine's
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,
    /// CPUs of each host, for example 1 or 0.5
    #[arg(long, value_name = "N")]
    cpus: Option<MilliCpu>,
    /// Rate of each link, for example 10gbit
    #[arg(long, value_name = "RATE")]
    link: Option<BitsPerSecond>,
    /// Put the hosts into N zones in turn: h1 gets the label zone=z1, h2 zone=z2 and so on
    #[arg(long, value_name = "N", conflicts_with = "no_daemons")]
    zones: Option<u32>,
    /// Hosts and links only: no controller, no agents
    #[arg(long)]
    no_daemons: bool,
    /// Let daemons stand still at named points of a move; for tests of faults
    #[arg(long)]
    hold_points: bool,
}

/// One line of `lab list`.
#[derive(Serialize)]
struct LabView {
    name: String,
    /// `None` where it is half made or half removed.
    hosts: Option<u32>,
    link: Option<String>,
    controller_pid: Option<u32>,
    agents_running: u32,
    api_socket: PathBuf,
}

/// Runs before any other thread does: `exec` replaces this process.
pub fn run(global: &Global, printer: &Printer, verb: LabVerb) -> Result<u8> {
    match verb {
        LabVerb::Up(args) => return up(global, printer, args),
        LabVerb::Demo(args) => return demo::run(printer, &args),
        LabVerb::Down { all: true, .. } => {
            godwit_lab::list().iter().try_for_each(|name| down(printer, name))?;
        }
        LabVerb::Down { which, .. } => down(printer, &existing(global, which)?)?,
        LabVerb::List => {
            let labs: Vec<LabView> = godwit_lab::list().into_iter().map(view).collect();
            printer.value(&labs, |labs| list(printer, labs))?;
            if labs.is_empty() {
                printer.say("no lab on this machine; `godwit lab up --hosts 3` makes one");
            }
        }
        LabVerb::Exec { which, node, command } => {
            let why = open(global, which)?.exec_in_host(node, &command)?;
            return Err(anyhow::Error::new(why).context(format!("cannot run {} on {node}", command[0])));
        }
        LabVerb::Kill(one) => {
            open(global, one.which)?.kill_daemon(one.node)?;
            printer
                .say(format_args!("the daemon of {} is killed; `godwit lab start {}` starts it", one.node, one.node));
        }
        LabVerb::Start(one) => {
            let lab = open(global, one.which)?;
            let pid = match one.node {
                Node::Controller => lab.start_controller()?,
                Node::Host(number) => lab.start_agent(number)?,
                Node::Client => return Err(Failure::new("no daemon runs on client").into()),
            };
            printer.say(format_args!("the daemon of {} runs as process {pid}", one.node));
        }
        LabVerb::Cut(one) => open(global, one.which)?.cut_link(one.node)?,
        LabVerb::Restore(one) => open(global, one.which)?.restore_link(one.node)?,
        LabVerb::Rate { one, rate } => open(global, one.which)?.set_link_rate(one.node, rate)?,
    }
    Ok(DONE)
}

/// The lab that is named: by `--name`, `--lab` or GODWIT_LAB.
fn named(global: &Global, which: Which) -> Result<Option<LabName>> {
    if which.name.is_some() {
        return Ok(which.name);
    }
    let variable = || std::env::var("GODWIT_LAB").ok().filter(|name| !name.is_empty());
    Ok(global.lab.clone().or_else(variable).map(LabName::new).transpose()?)
}

fn existing(global: &Global, which: Which) -> Result<LabName> {
    if let Some(name) = named(global, which)? {
        return Ok(name);
    }
    match godwit_lab::list().as_slice() {
        [only] => Ok(only.clone()),
        [] => Ok(LabName::new(DEFAULT_NAME)?),
        several => {
            let names: Vec<&str> = several.iter().map(LabName::as_str).collect();
            Err(Failure::new("there are several labs")
                .hint(format!("`--name` says which: {}", names.join(", ")))
                .into())
        }
    }
}

fn open(global: &Global, which: Which) -> Result<Lab> {
    Ok(Lab::open(&existing(global, which)?)?)
}

fn up(global: &Global, printer: &Printer, args: UpArgs) -> Result<u8> {
    let name = match named(global, args.which)? {
        Some(name) => name,
        None => LabName::new(DEFAULT_NAME)?,
    };
    let binary = std::env::current_exe().context("cannot find this program's own file")?;
    let mut spec = LabSpec::new(name.clone(), args.hosts, binary);
    spec.memory_bytes = args.memory.map(|m| m.0);
    spec.cpus_milli = args.cpus.map(|c| c.0);
    spec.link = args.link;
    spec.zones = args.zones;
    spec.start_daemons = !args.no_daemons;
    spec.hold_points = args.hold_points;
    printer.say(format_args!("making lab {name} with {}", human::count(args.hosts as usize, "host")));
    let lab = if args.no_daemons {
        Lab::up(spec)?
    } else {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Lab::up_until(spec, |lab| runtime.block_on(all_connected(lab)))?
    };
    printer.say(format_args!("lab {name} is up; `godwit lab down --name {name}` removes it"));
    if printer.is_json() {
        printer.json(&view(lab.spec().name.clone()))?;
    }
    Ok(DONE)
}

/// The sentence says who is missing.
async fn all_connected(lab: &Lab) -> Result<(), String> {
    let client = Client::new(Address::Unix(lab.paths().api_socket()));
    let hosts = client.hosts().await.map_err(|error| error.to_string())?;
    let connected = |node: &Node| hosts.iter().any(|h| h.connected && h.name.as_str() == node.to_string());
    let missing: Vec<String> =
        lab.spec().host_nodes().filter(|node| !connected(node)).map(|node| node.to_string()).collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("{} not connected to the controller", missing.join(", "))) }
}

fn down(printer: &Printer, name: &LabName) -> Result<()> {
    let existed = godwit_lab::list().contains(name);
    Lab::down_by_name(name)?;
    if existed {
        printer.say(format_args!("lab {name} is removed"));
    } else {
        printer.say(format_args!("there is no lab {name}"));
    }
    Ok(())
}

fn view(name: LabName) -> LabView {
    let lab = Lab::open(&name).ok();
    let running = |lab: &Lab| lab.spec().host_nodes().filter(|node| lab.daemon_pid(*node).is_some()).count();
    LabView {
        hosts: lab.as_ref().map(|lab| lab.spec().hosts),
        link: lab.as_ref().and_then(|lab| lab.spec().link).map(|rate| rate.to_string()),
        controller_pid: lab.as_ref().and_then(Lab::controller_pid),
        agents_running: lab.as_ref().map(running).unwrap_or_default() as u32,
        api_socket: godwit_lab::LabPaths::new(name.clone()).api_socket(),
        name: name.to_string(),
    }
}

fn list(printer: &Printer, labs: &[LabView]) -> String {
    let rows = labs.iter().map(|lab| {
        let state = match (lab.hosts, lab.controller_pid) {
            (None, _) => "broken",
            (Some(_), None) => "no controller",
            (Some(_), Some(_)) => "running",
        };
        vec![
            lab.name.clone(),
            state.to_owned(),
            human::or_dash(lab.hosts),
            lab.agents_running.to_string(),
            lab.link.clone().unwrap_or_else(|| "unlimited".to_owned()),
            lab.api_socket.display().to_string(),
        ]
    });
    table(printer, &["LAB", "STATE", "HOSTS", "AGENTS", "LINK", "SOCKET"], rows)
}
