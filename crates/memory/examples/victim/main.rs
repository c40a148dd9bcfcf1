//! Programs for the tests to track, dump and restore. Not for users.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test program")]

mod churn;
mod flags;
mod hold;
mod lazy;
mod memory;
mod pages;
mod reserve;
mod scatter;
mod speed;
mod tables;
mod tree;
mod wait;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["churn", seed] => churn::run(seed.parse().unwrap()),
        ["scatter", mib] => scatter::run(mib.parse().unwrap()),
        ["tables", seed] => tables::run(seed.parse().unwrap()),
        ["wait", kind] => wait::run(kind),
        ["signals"] => wait::count_signals(),
        ["lazy", socket, seed] => lazy::run(socket, seed.parse().unwrap()),
        ["hold", socket, inner_pid] => hold::run(socket, inner_pid.parse().unwrap()),
        ["filler", directory] => {
            let control = godwit_memory::filler_control().unwrap();
            godwit_memory::serve_filler(control, std::path::Path::new(directory)).unwrap();
        }
        ["flags", directory, sealed] => flags::run(directory, sealed.parse().unwrap()),
        ["read-smaps", pid] => flags::read_smaps(pid),
        ["reserve", gib, touched] => reserve::run(gib.parse().unwrap(), touched.parse().unwrap()),
        ["pages", pid, start, pages] => pages::run(pid, start.parse().unwrap(), pages.parse().unwrap()),
        ["speed", mib, cold] => speed::run(mib.parse().unwrap(), cold.parse().unwrap()),
        ["tree", report, private_mib, shared_mib] => {
            tree::run(report, private_mib.parse().unwrap(), shared_mib.parse().unwrap());
        }
        _ => panic!("unknown program {arguments:?}"),
    }
}
