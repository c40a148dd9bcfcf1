//! What there is on the hosts of a lab, seen from outside.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use godwit_lab::Node;
use rustix::process::{Pid, Signal, kill_process};

use crate::world::World;

/// A program of ours, or CRIU, that runs on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Keeper,
    Filler,
    /// The one that obeys; its own children are not meant.
    Criu,
}

impl Program {
    fn is(self, arguments: &[&str]) -> bool {
        match self {
            Self::Keeper => arguments.get(1) == Some(&"keeper"),
            Self::Filler => arguments.get(1) == Some(&"filler"),
            // It may have been started through its own loader.
            Self::Criu => arguments.contains(&"swrk"),
        }
    }
}

/// The processes of this lab's host that run a program.
pub fn running(world: &World, host: u32, program: Program) -> Vec<Pid> {
    let ours = format!("{}/", world.lab.paths().host_cgroup(Node::Host(host)));
    let mut found = BTreeMap::new();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let path = process.path();
        let read = |file: &str| std::fs::read_to_string(path.join(file)).unwrap_or_default();
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let command = read("cmdline");
        let arguments: Vec<&str> = command.split('\0').collect();
        if program.is(&arguments) && read("cgroup").contains(&ours) {
            let parent = read("status").lines().find_map(|l| l.strip_prefix("PPid:")?.trim().parse::<i32>().ok());
            found.insert(pid, parent);
        }
    }
    let of_another = |parent: &Option<i32>| parent.is_some_and(|p| found.contains_key(&p));
    found.iter().filter(|(_, parent)| !of_another(parent)).filter_map(|(pid, _)| Pid::from_raw(*pid)).collect()
}

/// Kills those that run a program on a host; how many there were.
pub fn kill(world: &World, host: u32, program: Program) -> usize {
    let pids = running(world, host, program);
    pids.iter().filter(|pid| kill_process(**pid, Signal::KILL).is_ok()).count()
}

/// Kills everything that runs on a host, its agent and its containers, as a power cut does.
pub fn kill_everything(world: &World, host: u32) {
    let ours = format!("{}/", world.lab.paths().host_cgroup(Node::Host(host)));
    const MAX_ROUNDS: usize = 50;
    for _ in 0..MAX_ROUNDS {
        let mut found = false;
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            let cgroups = std::fs::read_to_string(process.path().join("cgroup")).unwrap_or_default();
            // In hierarchies that limit nothing, a container that was moved stays where it was begun.
            let limits = |line: &&str| line.contains(":memory:") || line.starts_with("0::");
            if cgroups.lines().filter(limits).any(|line| line.contains(&ours)) {
                found = true;
                let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
            }
        }
        if !found {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("something on host {host} cannot be killed");
}

/// Runs a shell's commands on a host and returns what they print.
pub fn shell(world: &World, host: u32, script: &str) -> String {
    let output = world.lab.exec(Node::Host(host), &["sh", "-c", script]).unwrap().output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Everything of containers and moves on a host, a line each, in order.
pub fn remains(world: &World, host: u32) -> Vec<String> {
    let script = "cd /var/lib/godwit/agent || exit
        for item in containers/* volumes/* rcu-expedited; do [ ! -e \"$item\" ] || echo \"$item\"; done
        for item in /run/godwit/agent/moves/*; do [ ! -e \"$item\" ] || echo \"moves/${item##*/}\"; done
        ls /sys/class/net | sed -n 's/^gw[pt]/link &/p'
        sed -n 's/.* \\(\\/[^ ]*cgyard[^ ]*\\) .*/mount \\1/p' /proc/self/mountinfo";
    let mut all: Vec<String> = shell(world, host, script).lines().map(str::to_owned).collect();
    all.extend(cgroups(world, host));
    for (program, name) in [(Program::Keeper, "keeper"), (Program::Filler, "filler"), (Program::Criu, "criu")] {
        all.extend(running(world, host, program).iter().map(|_| name.to_owned()));
    }
    all.sort();
    all
}

/// What [`remains`] of one container that runs, and nothing else: container `id`, volumes of `name` (`ENV.LAYER-N`).
pub fn one_container(id: &str, name: &str) -> Vec<String> {
    let mut all =
        [format!("cgroup {id}"), format!("containers/{id}"), "keeper".to_owned(), format!("link gwp{id}")].to_vec();
    all.push(format!("volumes/{name}"));
    all.sort();
    all
}

/// Of containers, whatever controller they belong to.
fn cgroups(world: &World, host: u32) -> Vec<String> {
    let ours = world.lab.paths().containers_cgroup(Node::Host(host));
    let roots = directories(Path::new("/sys/fs/cgroup")).chain([PathBuf::from("/sys/fs/cgroup")]);
    let containers = roots.flat_map(|root| directories(&root.join(&ours[1..])));
    let names = containers.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
    let mut names: Vec<String> = names.filter(|name| name != "keepers").map(|name| format!("cgroup {name}")).collect();
    names.sort();
    names.dedup();
    names
}

fn directories(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let items = std::fs::read_dir(path).into_iter().flatten().flatten();
    items.map(|item| item.path()).filter(|path| path.is_dir())
}
