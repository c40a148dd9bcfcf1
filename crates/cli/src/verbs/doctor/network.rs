//! Links and firewall, in a network namespace that ends with this process.

use std::io::{self, Write};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};

use super::check::{Check, Requirement, Ways, need};

const NFT_FOR: &str = "isolation, published ports";
/// What the host network makes of links: what, for what, and the arguments to `ip`.
const LINKS: [(&str, &str, &str); 4] = [
    ("veth", "a container's link", "link add gwdoctor0 type veth peer name gwdoctor1"),
    ("bridge", "a host's part of a private network", "link add gwdoctor2 type bridge"),
    ("vxlan", "private networks between hosts", "link add gwdoctor3 type vxlan id 7 dstport 4789 nolearning"),
    ("tap", "frames that wait while a container moves", "tuntap add dev gwdoctor4 mode tap"),
];
/// Both families, the hooks and the statements that the real rules use.
const RULES: &str = "\
table bridge gwdoctor { chain c { type filter hook prerouting priority 0; ether type arp counter accept; }; }
table inet gwdoctor { chain n { type nat hook postrouting priority 100; masquerade; }; \
chain d { type nat hook prerouting priority -100; tcp dport 9 dnat ip to 192.0.2.1:9; }; \
chain f { type filter hook forward priority 0; ct state established accept; }; }
";

pub fn checks(ways: &Ways, is_root: bool) -> Vec<Check> {
    let rules = need("nftables", NFT_FOR);
    let not_checked = |why: &str| {
        let links = LINKS.map(|(what, purpose, _)| need(what, purpose).not_checked(why));
        links.into_iter().chain([rules.not_checked(why)]).collect()
    };
    if !is_root {
        return not_checked("needs root");
    }
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        let all = need("network namespaces", "a network of each container's own");
        let own = all.missing(error.to_string(), "a kernel with CONFIG_NET_NS");
        return [own].into_iter().chain(not_checked("needs network namespaces")).collect();
    }
    let links = LINKS.map(|(what, purpose, arguments)| link(ways, need(what, purpose), what, arguments));
    links.into_iter().chain([nftables(ways, rules)]).collect()
}

fn link(ways: &Ways, need: Requirement, kind: &str, arguments: &str) -> Check {
    let arguments: Vec<&str> = arguments.split(' ').collect();
    match run("ip", &arguments, "") {
        Ok(()) => need.ok("made one"),
        Err(Trouble::Program(error)) => need.missing(format!("ip: {error}"), ways.or("the package iproute2")),
        Err(Trouble::Refused(message)) => need.missing(message, format!("a kernel with {kind}: modprobe {kind}")),
    }
}

fn nftables(ways: &Ways, need: Requirement) -> Check {
    match run("nft", &["-f", "-"], RULES) {
        Ok(()) => need.ok("made tables bridge and inet"),
        Err(Trouble::Program(error)) => need.missing(format!("nft: {error}"), ways.or("the package nftables")),
        Err(Trouble::Refused(message)) => need.missing(message, "a kernel with nf_tables for bridge and inet"),
    }
}

enum Trouble {
    Program(io::Error),
    /// The program's first line.
    Refused(String),
}

/// Both programs only talk to the kernel, which answers at once.
fn run(program: &str, arguments: &[&str], input: &str) -> Result<(), Trouble> {
    let ended = || {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    };
    let output = ended().map_err(Trouble::Program)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(Trouble::Refused(text.lines().next().unwrap_or("no reason given").to_owned()))
}
