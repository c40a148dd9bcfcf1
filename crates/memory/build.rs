//! Builds the library that is loaded into criu (shim/leave_out.c).
#![allow(clippy::expect_used, reason = "a build script can only end")]

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=shim/leave_out.c");
    let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    // Free-standing: it is loaded by whatever libc criu has.
    let status = cc::Build::new()
        .get_compiler()
        .to_command()
        .args(["-shared", "-fPIC", "-O2", "-nostdlib", "-ffreestanding", "-fno-builtin", "-fno-stack-protector"])
        .args(["-fno-tree-loop-distribute-patterns", "-Wall", "-Wextra", "-Werror"])
        .args(["-Wl,--build-id=none", "-Wl,-soname,godwit-leave-out.so", "-o"])
        .arg(Path::new(&out).join("leave_out.so"))
        .arg("shim/leave_out.c")
        .status();
    assert!(status.is_ok_and(|s| s.success()), "shim/leave_out.c could not be built: is a C compiler installed?");
}
