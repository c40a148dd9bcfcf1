//! Help, usage errors, and what is said where no controller runs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use support::{godwit, output, show};

fn shown(args: &[&str]) -> String {
    show(&output(godwit(args)), "")
}

/// Help of every verb, also of those below others; a new verb is in here without being named.
#[test]
fn help() {
    let mut pages = String::new();
    let mut waiting: Vec<Vec<String>> = vec![Vec::new()];
    while let Some(verb) = waiting.pop() {
        let args: Vec<&str> = verb.iter().map(String::as_str).chain(["--help"]).collect();
        let output = output(godwit(&args));
        assert_eq!(support::code(&output), 0, "{args:?}");
        let page = String::from_utf8(output.stdout).unwrap();
        let commands = page.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
        let mut below: Vec<Vec<String>> = commands
            .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| *name != "help")
            .map(|name| [verb.as_slice(), &[name.to_owned()]].concat())
            .collect();
        below.reverse();
        waiting.append(&mut below);
        // The global options are the same everywhere: once is enough.
        let own = if verb.is_empty() { page.as_str() } else { page.split("Global options:").next().unwrap() };
        pages.push_str(&format!("$ godwit {}\n{}\n\n", args.join(" "), own.trim_end()));
    }
    insta::assert_snapshot!(pages);
}

#[test]
fn usage_errors_exit_with_2() {
    for (name, args) in [
        ("usage-no-such-verb", vec!["mgirate", "shop/db-1"]),
        ("usage-no-container", vec!["migrate"]),
        ("usage-bad-host", vec!["migrate", "shop/db-1", "--to", "H_1"]),
        ("usage-two-controllers", vec!["ps", "--lab", "a", "--controller", "unix:/x"]),
        ("usage-bad-format", vec!["ps", "--output", "xml"]),
        ("usage-bad-variable", vec!["env", "apply", "-f", "x", "--var", "NAME"]),
        ("usage-timeout-without-wait", vec!["env", "apply", "-f", "x", "--timeout", "5s"]),
        ("usage-bad-timeout", vec!["env", "apply", "-f", "x", "--wait", "--timeout", "soon"]),
        ("usage-bad-lab-host", vec!["lab", "exec", "x1", "--", "true"]),
        ("usage-bad-label", agent(&["--label", "zone=a b"])),
        ("usage-bad-rate", vec!["lab", "up", "--link", "fast"]),
    ] {
        let text = shown(&args);
        assert!(text.starts_with("exit: 2\n--- stdout\n--- stderr\nerror: "), "{text}");
        insta::assert_snapshot!(name, text);
    }
}

/// A complete command line of an agent, with more.
fn agent(more: &[&'static str]) -> Vec<&'static str> {
    let all = ["agent", "--controller", "127.0.0.1:1", "--name", "h1", "--tunnel-address", "127.0.0.1"];
    [&all, more].concat()
}

#[test]
fn a_label_is_given_once() {
    let args = agent(&["--label", "zone=a", "--label", "disk=ssd", "--label", "zone=b"]);
    insta::assert_snapshot!("agent-label-twice", shown(&args));
}

#[test]
fn no_controller() {
    insta::assert_snapshot!("no-controller", shown(&["ps", "--controller", "unix:/no/such/api.sock"]));
    insta::assert_snapshot!("no-controller-https", shown(&["ps", "--controller", "https://127.0.0.1:1"]));
    insta::assert_snapshot!("bad-address", shown(&["ps", "--controller", "localhost:80"]));
    insta::assert_snapshot!("bad-lab-name", shown(&["ps", "--lab", "Lab_1"]));
    insta::assert_snapshot!("version-alone", shown(&["version", "--controller", "unix:/no/such/api.sock"]));
    let mut variable = godwit(&["ps"]);
    variable.env("GODWIT_CONTROLLER", "nonsense");
    insta::assert_snapshot!("bad-variable", show(&output(variable), ""));
}
