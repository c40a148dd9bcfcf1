//! Before the first move: what is needed, the lab, the environment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use godwit_api::client::Client;
use godwit_api::types::{ApplyRequest, ContainerView};
use godwit_criu::Criu;
use godwit_lab::{Lab, LabName, LabSpec, Node};
use godwit_model::EnvName;
use godwit_model::container::Health;
use godwit_model::manifest::{self, Manifest};
use tokio::runtime::Runtime;

use super::{HOSTS, within};
use crate::failure::Failure;
use crate::human;
use crate::printer::Printer;
use crate::verbs::lab::all_connected;
use crate::verbs::ps;

/// The host whose published ports the clients use, wherever the containers are.
pub const ENTRANCE: Node = Node::Host(1);
/// Rate of every link.
const LINK: &str = "10gbit";
const MANIFEST: &str = include_str!("../../../../../../examples/demo.yaml");
/// Images, without which nothing can be shown.
const IMAGES: [&str; 3] = ["redis", "postgresql", "nginx"];
/// Where Debian keeps a PostgreSQL's programs, by its version.
const POSTGRESQL: &str = "/usr/lib/postgresql";
/// Unpacking images and making a database's files, on a slow disk.
const HEALTHY_LIMIT: Duration = Duration::from_secs(180);
/// How often containers are looked at: health and state are numbers of the agents, not events.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);

/// What was found to be there.
pub struct Stage {
    pub manifest: Manifest,
    pub pgbench: PathBuf,
    pub godwit: PathBuf,
}

impl Stage {
    /// Looks for everything the demonstration needs before anything is changed.
    pub fn check(images: &Path) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Err(Failure::new("the demonstration makes network and mount namespaces, which needs root")
                .hint("sudo ./dev demo")
                .into());
        }
        Criu::find()?;
        let missing: Vec<&str> = IMAGES.into_iter().filter(|name| !images.join(name).is_dir()).collect();
        if !missing.is_empty() {
            let message = format!("there is no image {} in {}", missing.join(", "), images.display());
            return Err(Failure::new(message)
                .hint("`./dev images` makes them; --images names another directory")
                .into());
        }
        let images = images.canonicalize().with_context(|| format!("cannot find {}", images.display()))?;
        let variables = BTreeMap::from([("IMAGES".to_owned(), images.to_string_lossy().into_owned())]);
        Ok(Self {
            manifest: manifest::parse("examples/demo.yaml", MANIFEST, None, &variables)?,
            pgbench: pgbench()?,
            godwit: std::env::current_exe().context("cannot find this program's own file")?,
        })
    }
}

/// Of the newest PostgreSQL. The wrapper in PATH would look for a cluster of this machine.
fn pgbench() -> Result<PathBuf> {
    let versions = std::fs::read_dir(POSTGRESQL).into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin/pgbench")).filter(|path| path.is_file()).max();
    found.ok_or_else(|| {
        Failure::new(format!("there is no pgbench below {POSTGRESQL}"))
            .hint("`./dev setup` installs it, or the package postgresql")
            .into()
    })
}

/// Makes the lab; one that an earlier run left is removed first.
pub fn make_lab(printer: &Printer, name: &LabName, runtime: &Runtime) -> Result<Lab> {
    if godwit_lab::list().contains(name) {
        printer.say(format_args!("removing lab {name} of an earlier run"));
        Lab::down_by_name(name)?;
    }
    printer.say(format_args!("making lab {name}: {}, links of {LINK}", human::count(HOSTS as usize, "host")));
    let binary = std::env::current_exe().context("cannot find this program's own file")?;
    let mut spec = LabSpec::new(name.clone(), HOSTS, binary);
    spec.link = Some(LINK.parse()?);
    Ok(Lab::up_until(spec, |lab| runtime.block_on(all_connected(lab)))?)
}

/// Applies the environment and waits until every container is healthy.
pub async fn environment(client: &Client, printer: &Printer, stage: &Stage) -> Result<()> {
    let env = stage.manifest.name.clone();
    printer.say(format_args!("applying environment {env}: Redis, PostgreSQL, nginx"));
    let request = ApplyRequest { manifest: stage.manifest.clone(), dry_run: false };
    client.apply(&request).await?;
    let mut last = Vec::new();
    let healthy = within(HEALTHY_LIMIT, "healthy containers", all_healthy(client, &env, &mut last)).await;
    healthy.map_err(|error| {
        let states: Vec<String> = last.iter().map(sentence).collect();
        error.context(format!("environment {env} is not healthy: {}", states.join("; ")))
    })
}

async fn all_healthy(client: &Client, env: &EnvName, last: &mut Vec<ContainerView>) -> Result<()> {
    loop {
        *last = client.containers(Some(env)).await?;
        let healthy = |c: &ContainerView| c.state == "running" && matches!(c.health, Some(Health::Healthy));
        if !last.is_empty() && last.iter().all(healthy) {
            return Ok(());
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn sentence(container: &ContainerView) -> String {
    let message = container.message.as_ref().map(|message| format!(": {message}")).unwrap_or_default();
    format!("{} is {}{message}", container.name, ps::state(container))
}
