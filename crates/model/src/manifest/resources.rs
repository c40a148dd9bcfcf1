//! How much a container gets: `deploy.resources`, `mem_limit`, `cpus`, `pids_limit`, or cloudlets.

use super::field::{Field, Known};
use super::{CloudletRange, LayerResources};
use crate::units::{Bytes, Cloudlets, MilliCpu};

/// Least memory that a limit may leave a container; less is a forgotten unit.
const MIN_MEMORY: Bytes = Bytes::mib(4);
/// Most cloudlets of one container (128 GiB of memory).
const MAX_CLOUDLETS: u32 = 1024;

/// Reads them all. Each quantity may be given in one way only.
pub(super) fn resources(
    service: &Known<'_>,
    deploy: Option<&Known<'_>>,
    extension: Option<&Known<'_>>,
) -> LayerResources {
    let declared = deploy
        .and_then(|deploy| deploy.get("resources"))
        .and_then(|field| field.known(&["limits", "reservations"], &[]));
    let part = |name: &str, keys: &[&'static str]| {
        let unsupported = [("devices", "remove it, devices of the host would make the container not movable")];
        declared.as_ref().and_then(|d| d.get(name)).and_then(|field| field.known(keys, &unsupported))
    };
    let limits = part("limits", &["cpus", "memory", "pids"]);
    let reservations = part("reservations", &["cpus", "memory"]);
    let limit = |key: &str| limits.as_ref().and_then(|l| l.get(key));
    let reservation = |key: &str| reservations.as_ref().and_then(|r| r.get(key));

    let memory_field = once(limit("memory"), service.get("mem_limit"));
    let cpu_field = once(limit("cpus"), service.get("cpus"));
    let reserved_memory_field = once(reservation("memory"), service.get("mem_reservation"));
    let reserved_cpu_field = reservation("cpus");
    let resources = LayerResources {
        memory: memory_field.and_then(memory),
        cpu: cpu_field.and_then(cpu),
        pids: once(limit("pids"), service.get("pids_limit")).and_then(|field| field.number_u32(1, 4_000_000)),
        reserved_memory: reserved_memory_field.and_then(memory),
        reserved_cpu: reserved_cpu_field.and_then(cpu),
        cloudlets: extension.and_then(|x| x.get("cloudlets")).and_then(cloudlets),
    };
    if let (Some(limit), Some(reserved), Some(field)) =
        (resources.memory, resources.reserved_memory, reserved_memory_field)
        && reserved > limit
    {
        field.error::<()>(format!("{reserved} are reserved, more than the limit of {limit}"));
    }
    if let (Some(limit), Some(reserved), Some(field)) = (resources.cpu, resources.reserved_cpu, reserved_cpu_field)
        && reserved > limit
    {
        field.error::<()>(format!("{reserved} CPUs are reserved, more than the limit of {limit}"));
    }
    if resources.cloudlets.is_some() {
        for field in [memory_field, cpu_field, reserved_memory_field, reserved_cpu_field].into_iter().flatten() {
            field.error_hint::<()>(
                "memory and CPUs are given here and as cloudlets too",
                "keep one of them; a cloudlet is 128 MiB of memory and 400 MHz of CPU",
            );
        }
    }
    resources
}

/// The field that is there; both is an error even if they agree now.
fn once<'f, 'a>(deploy: Option<&'f Field<'a>>, short: Option<&'f Field<'a>>) -> Option<&'f Field<'a>> {
    if let (Some(deploy), Some(short)) = (deploy, short) {
        short.error_hint::<()>(format!("{} says the same already", deploy.path), "keep one of them");
    }
    deploy.or(short)
}

fn memory(field: &Field<'_>) -> Option<Bytes> {
    let bytes: Bytes = field.parsed()?;
    if bytes < MIN_MEMORY {
        return field.error_hint(
            format!("{bytes} of memory are too little, {MIN_MEMORY} is the least"),
            "write the unit too, for example 512m or 1g; leave the key out for no limit",
        );
    }
    Some(bytes)
}

fn cpu(field: &Field<'_>) -> Option<MilliCpu> {
    let cpu: MilliCpu = field.parsed()?;
    if cpu < MilliCpu(10) {
        return field
            .error_hint(format!("{cpu} CPUs are too little, 0.01 is the least"), "leave the key out for no limit");
    }
    Some(cpu)
}

/// `cloudlets: 4` or `cloudlets: {reserved: 2, limit: 8}`.
fn cloudlets(field: &Field<'_>) -> Option<CloudletRange> {
    let number = |field: &Field<'_>| field.number_u32(1, MAX_CLOUDLETS).map(Cloudlets);
    if !field.is_map() {
        let both = number(field)?;
        return Some(CloudletRange { reserved: both, limit: both });
    }
    let known = field.known(&["reserved", "limit"], &[])?;
    let (reserved, limit) = (known.get("reserved"), known.get("limit"));
    let (Some(reserved), Some(limit)) = (reserved, limit) else {
        return field
            .error_hint("both reserved and limit are needed", "write for example cloudlets: {reserved: 2, limit: 8}");
    };
    let range = CloudletRange { reserved: number(reserved)?, limit: number(limit)? };
    if range.reserved > range.limit {
        return reserved
            .error(format!("{} cloudlets are reserved, more than the limit of {}", range.reserved, range.limit));
    }
    Some(range)
}
