//! `godwit sim` by the real binary: the same seed says the same, byte for byte.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::{Command, Output};

fn sim(seed: &str, format: &str) -> Output {
    let arguments = ["sim", "--hosts", "8", "--containers", "90", "--hours", "12", "--output", format, "--seed", seed];
    Command::new(env!("CARGO_BIN_EXE_godwit")).args(arguments).output().unwrap()
}

#[test]
fn the_same_seed_says_the_same_byte_for_byte() {
    for format in ["table", "json"] {
        let (first, second) = (sim("7", format), sim("7", format));
        assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
        assert_eq!((&first.stdout, &first.stderr), (&second.stdout, &second.stderr));
        assert_ne!(first.stdout, sim("8", format).stdout);
    }
    let text = String::from_utf8(sim("7", "table").stdout).unwrap();
    for part in ["HOUR", "moves per hour", "longest down", "flaps", "kept: rules on every host"] {
        assert!(text.contains(part), "{part:?} is missing in\n{text}");
    }
}
