//! A container's root file system: image layers, seen with the container's ids, below a
//! directory for its own changes.
//!
//! ```text
//!  layers (ids 0…65535 on disk, shared)      dir/lower/N   idmapped bind mounts, only while mounting
//!  dir/upper (ids id_base+… on disk), dir/work  ──overlay──▶  dir/rootfs
//! ```

mod copy;
mod idmap;
mod remove;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Gid, Uid};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, move_mount, open_tree, unmount};

pub use copy::{CopyError, copy_image_dir_to_volume};
pub use idmap::UserNamespaceError;
pub use remove::{RemoveError, mount_points_below, remove_dir_all_no_xdev};

use crate::spec::ID_COUNT;
use crate::sys::{MountAttributes, mount_setattr};

/// Most layers of one image; overlayfs itself takes 500.
pub const MAX_LAYERS: usize = 128;
/// mount(2) takes one page of options.
const MAX_OPTIONS_BYTES: usize = 4095;

/// Where a root file system is made of what; holds names only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootFs {
    /// Unpacked layers, lowest first.
    pub layers: Vec<PathBuf>,
    /// The container's directory.
    pub dir: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum RootFsError {
    #[error("an image of {count} layers cannot be mounted: 1 to {MAX_LAYERS} are possible")]
    Layers { count: usize },
    #[error("{path} cannot be an overlay directory: it has one of the characters : , \\ in its name")]
    Name { path: PathBuf },
    #[error(
        "{count} layers need {bytes} bytes of mount options, more than {MAX_OPTIONS_BYTES}: use a shorter state directory"
    )]
    TooLong { count: usize, bytes: usize },
    #[error("cannot {action} {path}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot make a user namespace for ids from {id_base}")]
    UserNamespace { id_base: u32, source: UserNamespaceError },
    #[error(
        "the file system of {path} cannot show files with other ids: keep layers on ext4, xfs or btrfs with Linux 5.19 or later"
    )]
    NotIdmappable { path: PathBuf, source: io::Error },
    #[error(
        "cannot mount the overlay {path}: its directories need a file system with extended attributes (ext4, xfs, btrfs)"
    )]
    Overlay { path: PathBuf, source: io::Error },
    #[error("{path} is still mounted")]
    StillMounted { path: PathBuf },
    #[error(transparent)]
    Remove(#[from] RemoveError),
}

impl RootFs {
    /// Where the mounted root file system is.
    pub fn path(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Where the container's own changes are.
    pub fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// Mounts it with ids from `id_base` on and gives its path; one that is mounted stays so.
    pub fn mount(&self, id_base: u32) -> Result<PathBuf, RootFsError> {
        let target = self.path();
        if mount_points_below(&self.dir)?.contains(&target) {
            return Ok(target);
        }
        let count = self.layers.len();
        if count == 0 || count > MAX_LAYERS {
            return Err(RootFsError::Layers { count });
        }
        if self.dir.to_string_lossy().contains([':', ',', '\\']) {
            return Err(RootFsError::Name { path: self.dir.clone() });
        }
        make_directory(&self.dir.join("lower"))?;
        make_directory(&self.dir.join("work"))?;
        make_directory(&target)?;
        let upper = self.upper();
        make_directory(&upper)?;
        let owner = (Some(Uid::from_raw(id_base)), Some(Gid::from_raw(id_base)));
        rustix::fs::chown(&upper, owner.0, owner.1).map_err(at("give to the container", &upper))?;

        let result = self.mount_layers(id_base).and_then(|lower| self.mount_overlay(&lower));
        // The overlay has its own references to the layers.
        let cleared = self.unmount_layers();
        result?;
        if let Err(error) = cleared {
            // The overlay is no use to a caller that gets an error.
            self.unmount()?;
            return Err(error);
        }
        Ok(target)
    }

    /// Binds each layer with shifted ids below `dir/lower`; gives the paths, lowest first.
    fn mount_layers(&self, id_base: u32) -> Result<Vec<PathBuf>, RootFsError> {
        let userns = idmap::user_namespace(id_base, ID_COUNT)
            .map_err(|source| RootFsError::UserNamespace { id_base, source })?;
        let mut lower = Vec::with_capacity(self.layers.len());
        for (number, layer) in self.layers.iter().enumerate() {
            let path = self.dir.join("lower").join(number.to_string());
            make_directory(&path)?;
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let tree = open_tree(CWD, layer, flags).map_err(at("take layer", layer))?;
            mount_setattr(tree.as_fd(), MountAttributes::default(), Some(userns.as_fd()))
                .map_err(|source| RootFsError::NotIdmappable { path: layer.clone(), source })?;
            move_mount(&tree, "", CWD, &path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(at("mount", &path))?;
            lower.push(path);
        }
        Ok(lower)
    }

    /// Without redirects and metadata-only copies a change is a plain file of the upper
    /// directory, which can be copied to another host and means the same there.
    fn mount_overlay(&self, lower: &[PathBuf]) -> Result<(), RootFsError> {
        let names: Vec<_> = lower.iter().rev().map(|path| path.to_string_lossy()).collect();
        let options = format!(
            "lowerdir={},upperdir={},workdir={},index=off,metacopy=off,redirect_dir=off",
            names.join(":"),
            self.upper().display(),
            self.dir.join("work").display(),
        );
        let bytes = options.len();
        if bytes > MAX_OPTIONS_BYTES {
            return Err(RootFsError::TooLong { count: lower.len(), bytes });
        }
        let path = self.path();
        let options = std::ffi::CString::new(options).map_err(|_| RootFsError::Name { path: path.clone() })?;
        mount("overlay", &path, "overlay", MountFlags::NODEV, options.as_c_str())
            .map_err(|error| RootFsError::Overlay { path, source: error.into() })
    }

    fn unmount_layers(&self) -> Result<(), RootFsError> {
        let lower = self.dir.join("lower");
        for path in mount_points_below(&lower)?.into_iter().rev() {
            unmount(&path, UnmountFlags::NOFOLLOW).map_err(at("unmount", &path))?;
        }
        remove_dir_all_no_xdev(&lower)?;
        Ok(())
    }

    /// Unmounts everything below `dir`, deepest first; nothing mounted is fine.
    pub fn unmount(&self) -> Result<(), RootFsError> {
        // More than one mount can lie on one path.
        const MAX_ROUNDS: usize = 8;
        for _ in 0..MAX_ROUNDS {
            let below = mount_points_below(&self.dir)?;
            if below.is_empty() {
                return Ok(());
            }
            for path in below.into_iter().rev() {
                match unmount(&path, UnmountFlags::NOFOLLOW) {
                    // Somebody works in it: take it out of sight, it goes with its last user.
                    Err(rustix::io::Errno::BUSY) => unmount(&path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH),
                    other => other,
                }
                .map_err(at("unmount", &path))?;
            }
        }
        match mount_points_below(&self.dir)?.into_iter().next() {
            None => Ok(()),
            Some(path) => Err(RootFsError::StillMounted { path }),
        }
    }

    /// Unmounts and removes the container's whole directory, its changes included.
    pub fn delete(&self) -> Result<(), RootFsError> {
        self.unmount()?;
        remove_dir_all_no_xdev(&self.dir)?;
        Ok(())
    }
}

fn at<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> RootFsError {
    move |source| RootFsError::Io { action, path: path.to_owned(), source: source.into() }
}

fn make_directory(path: &Path) -> Result<(), RootFsError> {
    match std::fs::DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(at("make", path)),
    }
}
