//! Users and capabilities of a process in a container.

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::InitError;
use crate::spec::User;

/// What root inside keeps: the usual default without NET_RAW, MKNOD and AUDIT_WRITE. All of
/// them hold in the container's user namespace only.
pub const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SYS_CHROOT);

/// Highest capability number the kernel may know (64-bit sets).
const CAPABILITY_BITS: u32 = 64;

/// Becomes root of the namespace with all its capabilities, for building its world.
pub fn become_root_inside() -> Result<(), InitError> {
    become_ids(&User::default())
}

fn become_ids(user: &User) -> Result<(), InitError> {
    let raw = |ids: &[u32]| ids.iter().map(|id| rustix::process::Gid::from_raw(*id)).collect::<Vec<_>>();
    set_thread_groups(&raw(&user.groups)).map_err(InitError::at("set groups"))?;
    let gid = rustix::process::Gid::from_raw(user.gid);
    set_thread_res_gid(gid, gid, gid).map_err(InitError::at(format!("become group {}", user.gid)))?;
    let uid = rustix::process::Uid::from_raw(user.uid);
    set_thread_res_uid(uid, uid, uid).map_err(InitError::at(format!("become user {}", user.uid)))
}

/// Gives up everything a container's program is not meant to have and becomes `user`. Root
/// keeps [`CAPABILITIES`], others keep none.
pub fn restrict(user: &User) -> Result<(), InitError> {
    let failed = || InitError::at("give up capabilities");
    for number in 0..CAPABILITY_BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if CAPABILITIES.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            // Beyond the last one this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            other => other.map_err(failed())?,
        }
    }
    clear_ambient_capability_set().map_err(failed())?;
    set_keep_capabilities(false).map_err(failed())?;
    become_ids(user)?;
    let left = if user.uid == 0 { CAPABILITIES } else { CapabilitySet::empty() };
    let sets = CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed())?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    Ok(())
}

/// Closes /proc/self to the container until the exec, also against its root.
pub fn hide_from_container() -> Result<(), InitError> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(InitError::at("hide the launcher"))
}
