//! A container's life by its keeper, on the real kernel.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{World, root_or_skip};

#[test]
fn a_program_runs_isolated_and_its_exit_code_and_output_are_known() {
    if !root_or_skip() {
        return;
    }
    let world = World::new("run", "echo pid $$ on $(hostname), $COLOUR; id -u; echo oops >&2; exit 7");
    let (exit, log) = world.run_to_end();
    assert_eq!((exit.code, exit.signal), (Some(7), None), "{log}");
    assert!(log.contains("pid 1 on box-1, green\n0\n"), "{log}");
    assert!(log.contains("oops"), "{log}");
    world.finish();
}
