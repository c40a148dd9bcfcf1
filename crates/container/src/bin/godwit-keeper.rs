//! `godwit-keeper keeper --dir DIR`: the keeper alone, as `godwit keeper` starts it.

use std::path::Path;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let code = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "keeper", "--dir", dir] => godwit_container::keeper_main(Path::new(dir), None),
        [_, "keeper", "--dir", dir, "--lease", lease] => {
            godwit_container::keeper_main(Path::new(dir), Some(Path::new(lease)))
        }
        _ => {
            eprintln!("usage: godwit-keeper keeper --dir DIR [--lease FILE]");
            2
        }
    };
    std::process::exit(code);
}
