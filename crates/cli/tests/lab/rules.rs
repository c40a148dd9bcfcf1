//! Rules of placement on hosts in zones: kept by creation, moves and an evacuation, and explained.

use crate::world::World;

const SHOP: &str = r#"
name: s
services:
  db:
    image: oci:${IMAGES}/busybox:latest
    command: [sleep, "100000"]
    deploy: {replicas: 2}
    x-godwit: {spread: strict, require: {zone: z1}, apart: [disks]}
  api:
    image: oci:${IMAGES}/busybox:latest
    command: [sleep, "100000"]
    deploy: {replicas: 2}
    x-godwit: {max-per-host: 1, near: [db]}
  log:
    image: oci:${IMAGES}/busybox:latest
    command: [sleep, "100000"]
    x-godwit: {apart: [disks], require: {zone: z2}}
"#;

/// h1, h3 and h5 are in z1, h2 and h4 in z2.
#[test]
fn rules_are_kept_on_hosts_in_zones() {
    let Some(world) = World::up("rules", 5, &["--zones", "2"]) else { return };
    let listed = world.ok(&["host", "list"]);
    assert_eq!((listed.matches(" z1 ").count(), listed.matches(" z2 ").count()), (3, 2), "{listed}");
    let path = world.manifest(&SHOP.replace("replicas: 2", "replicas: 4"));
    let said = world.refused(1, &["env", "apply", "-f", path.to_str().unwrap()]);
    assert!(said.contains("4 containers, at most 1 on a host, need 4 hosts with zone=z1, and 3 are known"), "{said}");

    let path = world.manifest(SHOP);
    let foreseen = world.json(&["env", "apply", "--dry-run", "-f", path.to_str().unwrap()]);
    assert_eq!(foreseen["places"].as_array().unwrap().len(), 5, "{foreseen:#}");
    world.apply(SHOP);
    for name in ["s/db-1", "s/db-2", "s/api-1", "s/api-2", "s/log-1"] {
        world.wait_running(name);
    }
    let kept = |world: &World| {
        let host = |name: &str| world.host_of(name);
        let mut db = [host("s/db-1"), host("s/db-2")];
        let mut api = [host("s/api-1"), host("s/api-2")];
        let log = host("s/log-1");
        db.sort();
        api.sort();
        assert!(db[0] != db[1] && db.iter().all(|h| ["h1", "h3", "h5"].contains(&h.as_str())), "{db:?}");
        assert_eq!(api, db, "each near one of db, never two on a host");
        assert!(!db.contains(&log), "{log} has two of the group disks");
    };
    kept(&world);

    // Neither goes alone; together they go when their host is emptied.
    let host = world.host_of("s/db-1");
    let free = ["h1", "h3", "h5"].into_iter().find(|h| on(&world, h) == 0).unwrap();
    let said = world.refused(1, &["migrate", "s/db-1", "--to", free, "--dry-run"]);
    assert!(said.contains("must be near it"), "{said}");
    let plan = world.ok(&["plan", "evacuate", &host]);
    assert!(plan.contains(&format!("s/db-1 {host} → {free}")) && plan.contains("it goes together with"), "{plan}");
    let lost = world.ok(&["plan", "fail", &host]);
    assert!(lost.contains(&format!("s/db-1 → {free}")), "{lost}");
    world.ok(&["host", "evacuate", &host]);
    assert_eq!((world.host_of("s/db-1").as_str(), on(&world, &host)), (free, 0));
    kept(&world);
    let explained = world.ok(&["explain", "s/db-1"]);
    assert!(explained.contains(&format!("{free}: it is here: layer 0")), "{explained}");
    assert!(explained.contains("out: it has no label zone=z1"), "{explained}");
    world.down();
}

/// How many containers are on a host.
fn on(world: &World, host: &str) -> usize {
    world.json(&["ps"]).as_array().unwrap().iter().filter(|c| c["host"] == host).count()
}
