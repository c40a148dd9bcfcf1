//! Root file systems of layers with shifted ids, volumes filled from images, safe removal.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;

use common::root_or_skip;
use godwit_container::{RootFs, copy_image_dir_to_volume, remove_dir_all_no_xdev};

const ID_BASE: u32 = 300_000;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = PathBuf::from(format!("/var/tmp/godwit-files-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let rootfs = RootFs { layers: vec![], dir: self.0.clone() };
        if let Err(error) = rootfs.delete() {
            eprintln!("take down {}: {error}", self.0.display());
        }
    }
}

#[test]
fn layers_lie_on_each_other_with_the_containers_ids() {
    if !root_or_skip() {
        return;
    }
    let scratch = Scratch::new("layers");
    let (lowest, middle) = (scratch.0.join("lowest"), scratch.0.join("middle"));
    for layer in [&lowest, &middle] {
        std::fs::create_dir_all(layer.join("etc")).unwrap();
    }
    std::fs::write(lowest.join("etc/a"), "lowest").unwrap();
    std::fs::write(lowest.join("etc/b"), "lowest").unwrap();
    std::fs::write(middle.join("etc/b"), "middle").unwrap();
    std::os::unix::fs::chown(lowest.join("etc/a"), Some(7), Some(8)).unwrap();
    let dir = scratch.0.join("container");
    std::fs::create_dir(&dir).unwrap();
    let rootfs = RootFs { layers: vec![lowest.clone(), middle], dir };
    let root = rootfs.mount(ID_BASE).unwrap();
    assert_eq!(rootfs.mount(ID_BASE).unwrap(), root, "mounting again changes nothing");
    assert_eq!(std::fs::read_to_string(root.join("etc/b")).unwrap(), "middle");
    let owner = std::fs::metadata(root.join("etc/a")).unwrap();
    assert_eq!((owner.uid(), owner.gid()), (ID_BASE + 7, ID_BASE + 8));
    assert_eq!(std::fs::metadata(&root).unwrap().uid(), ID_BASE);
    // A change keeps the ids it is seen with and leaves the layer alone.
    std::fs::write(root.join("etc/a"), "changed").unwrap();
    assert_eq!(std::fs::metadata(rootfs.upper().join("etc/a")).unwrap().uid(), ID_BASE + 7);
    assert_eq!(std::fs::read_to_string(lowest.join("etc/a")).unwrap(), "lowest");
    assert_eq!(std::fs::metadata(lowest.join("etc/a")).unwrap().uid(), 7);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let lower = rootfs.dir.join("lower");
    let left = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .any(|path| std::path::Path::new(path).starts_with(&lower));
    assert!(!left && !lower.exists(), "the layers' mounts are gone");

    rootfs.unmount().unwrap();
    rootfs.unmount().unwrap();
    assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
    assert_eq!(rootfs.mount(ID_BASE).unwrap(), root);
    assert_eq!(std::fs::read_to_string(root.join("etc/a")).unwrap(), "changed", "changes last");
    rootfs.delete().unwrap();
    assert!(!rootfs.dir.exists());
    assert!(lowest.join("etc/a").exists());
}

#[test]
fn an_image_of_many_layers_can_be_mounted() {
    if !root_or_skip() {
        return;
    }
    let scratch = Scratch::new("many");
    let layers: Vec<PathBuf> = (0..40).map(|number| scratch.0.join(format!("layer{number}"))).collect();
    for (number, layer) in layers.iter().enumerate() {
        std::fs::create_dir(layer).unwrap();
        std::fs::write(layer.join(format!("file{number}")), "").unwrap();
    }
    let dir = scratch.0.join("container");
    std::fs::create_dir(&dir).unwrap();
    let rootfs = RootFs { layers, dir };
    let root = rootfs.mount(ID_BASE).unwrap();
    assert_eq!(std::fs::read_dir(root).unwrap().count(), 40);
    rootfs.delete().unwrap();
}

#[test]
fn nothing_is_deleted_through_a_mount() {
    if !root_or_skip() {
        return;
    }
    let scratch = Scratch::new("xdev");
    let (precious, doomed) = (scratch.0.join("precious"), scratch.0.join("doomed"));
    std::fs::create_dir_all(doomed.join("a/bind")).unwrap();
    std::fs::create_dir(&precious).unwrap();
    std::fs::write(precious.join("file"), "x").unwrap();
    // The same device: a device number would not tell.
    rustix::mount::mount_bind(&precious, doomed.join("a/bind")).unwrap();
    let said = remove_dir_all_no_xdev(&doomed).unwrap_err().to_string();
    assert!(said.contains("a/bind mounted"), "{said}");
    assert!(precious.join("file").exists() && doomed.join("a").exists());
    RootFs { layers: vec![], dir: doomed.clone() }.delete().unwrap();
    assert!(precious.join("file").exists() && !doomed.exists());
}

#[test]
fn a_new_volume_takes_what_the_image_has_there() {
    if !root_or_skip() {
        return;
    }
    let scratch = Scratch::new("volume");
    let (root, volume) = (scratch.0.join("root"), scratch.0.join("volume"));
    let data = root.join("var/data");
    std::fs::create_dir_all(data.join("sub")).unwrap();
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(data.join("sub/file"), "content").unwrap();
    std::os::unix::fs::chown(data.join("sub/file"), Some(ID_BASE + 5), Some(ID_BASE)).unwrap();
    std::fs::set_permissions(&data, std::os::unix::fs::PermissionsExt::from_mode(0o2750)).unwrap();
    symlink("/etc/passwd", data.join("link")).unwrap();
    // A link on the way resolves inside the image.
    symlink("/var/data", root.join("data")).unwrap();
    copy_image_dir_to_volume(&root, "/data", &volume).unwrap();
    assert_eq!(std::fs::read_to_string(volume.join("sub/file")).unwrap(), "content");
    assert_eq!(std::fs::metadata(volume.join("sub/file")).unwrap().uid(), ID_BASE + 5);
    assert_eq!(std::fs::read_link(volume.join("link")).unwrap(), PathBuf::from("/etc/passwd"));
    assert_eq!(std::fs::metadata(&volume).unwrap().mode() & 0o7777, 0o2750);
    // What is in a volume is never touched again; what the image has not is nothing.
    std::fs::write(volume.join("sub/file"), "mine").unwrap();
    copy_image_dir_to_volume(&root, "/data", &volume).unwrap();
    assert_eq!(std::fs::read_to_string(volume.join("sub/file")).unwrap(), "mine");
    copy_image_dir_to_volume(&root, "/absent", &volume).unwrap();
    copy_image_dir_to_volume(&root, "/../../etc", &volume).unwrap();
}
