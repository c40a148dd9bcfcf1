//! Compose files: what they become, and what is said of those that are wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::BTreeMap;
use std::path::Path;

use godwit_model::container::{HealthCheck, RestartPolicy};
use godwit_model::manifest::{CloudletRange, Dependency, MAX_ERRORS, Manifest, Spread, parse};
use godwit_model::{Bytes, Cloudlets, LayerName, MilliCpu};
use proptest::prelude::*;

fn vars() -> BTreeMap<String, String> {
    [("IMAGES", "/srv/images"), ("TAG", "7"), ("EMPTY", "")].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
}

fn good(text: &str) -> Manifest {
    parse("/srv/app/env.yaml", text, Some("app"), &vars()).unwrap_or_else(|errors| panic!("{errors}"))
}

fn errors(text: &str) -> String {
    parse("env.yaml", text, Some("app"), &vars()).expect_err("it is wrong").to_string()
}

/// What is said of a service `a` with these lines after its image.
fn service_errors(lines: &str) -> String {
    let lines: String = lines.lines().map(|line| format!("    {line}\n")).collect();
    errors(&format!("services:\n  a:\n    image: x\n{lines}"))
}

fn layer_name(name: &str) -> LayerName {
    LayerName::new(name).unwrap()
}

#[test]
fn examples_are_read() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let mut count = 0;
    for file in std::fs::read_dir(directory).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|e| e == "yaml") {
            let text = std::fs::read_to_string(&path).unwrap();
            if let Err(errors) = parse(path.to_str().unwrap(), &text, None, &vars()) {
                panic!("{errors}");
            }
            count += 1;
        }
    }
    assert!(count > 0);
}

#[test]
fn the_shop_means_what_it_says() {
    let manifest = parse("shop.yaml", include_str!("../../../examples/shop.yaml"), None, &vars()).unwrap();
    assert_eq!(manifest.name.as_str(), "shop");
    let names: Vec<_> = manifest.layers.keys().map(LayerName::as_str).collect();
    assert_eq!(names, ["cache", "db", "web"]);
    let web = &manifest.layers[&layer_name("web")];
    assert_eq!((web.replicas, web.image.as_str()), (2, "oci:/srv/images/nginx:latest"));
    assert_eq!((web.ports[0].host_port, web.ports[0].container_port, web.ports[0].udp), (8080, 80, false));
    assert_eq!((web.resources.memory, web.resources.cpu), (Some(Bytes::mib(256)), Some(MilliCpu(500))));
    assert_eq!(web.spread, Spread::Strict);
    let needs = [(layer_name("cache"), Dependency::Started), (layer_name("db"), Dependency::Healthy)];
    assert_eq!(web.depends_on, BTreeMap::from(needs));
    let db = &manifest.layers[&layer_name("db")];
    assert_eq!(
        (db.volumes[0].volume.as_str(), db.volumes[0].target.as_str()),
        ("db-files", "/var/lib/postgresql/data")
    );
    assert_eq!((db.stop_signal.as_deref(), db.stop_grace_ms), (Some("SIGINT"), 60_000));
    assert_eq!(db.resources.cloudlets, Some(CloudletRange { reserved: Cloudlets(4), limit: Cloudlets(12) }));
    let health = db.health.as_ref().unwrap();
    assert_eq!((health.interval_ms, health.retries, health.start_period_ms), (5_000, 5, 30_000));
    assert_eq!(manifest.layers[&layer_name("cache")].command.as_ref().unwrap().last().unwrap(), "");
    // What is stored is read back as the same value.
    let json = serde_json::to_string(&manifest).unwrap();
    assert_eq!(serde_json::from_str::<Manifest>(&json).unwrap(), manifest);
}

#[test]
fn two_ways_of_writing_are_one_manifest() {
    let long = good(
        "name: app
services:
  b: {image: 'x:${TAG}'}
  a:
    image: x:7
    command: [redis-server, --port, '6379']
    environment: {A: '1', B: $$x, IMAGES: }
    labels: {tier: front, plain: ''}
    deploy: {replicas: 3, mode: replicated, resources: {limits: {memory: 1gb, cpus: 1.5, pids: 50}}}
    volumes:
      - {type: volume, source: data, target: /data}
      - {type: bind, source: ./conf, target: /etc/conf, read_only: true}
      - {type: tmpfs, target: /scratch, tmpfs: {size: 64m}}
    ports:
      - {target: 53, published: 53, protocol: udp}
      - {target: 80, published: '8080'}
      - {target: 81, published: '8081'}
    healthcheck: {test: [CMD-SHELL, curl -f localhost], interval: 1m30s}
    depends_on: {b: {condition: service_started}}
    ulimits: {nofile: {soft: 1024, hard: 1024}}
    networks: {default: {aliases: [front]}}
    x-godwit: {spread: none}
volumes: {data: {driver: local}}
networks: {default: }
",
    );
    let short = good(
        "x-common: &common
  command: redis-server --port 6379
  ulimits: {nofile: 1024}
volumes: {data: }
x-godwit: {spread: none}
services:
  a:
    <<: *common
    image: x:$TAG
    environment: [A=1, B=$$x, IMAGES]
    labels: [plain, tier=front]
    scale: 3
    mem_limit: 1024m
    cpus: '1.50'
    pids_limit: 50
    volumes: ['/srv/app/x/../conf/:/etc//conf/:ro', 'data:/data']
    tmpfs: /scratch:size=64MiB
    ports: ['8080-8081:80-81', '53:53/udp']
    expose: [9000, 9001-9002/tcp]
    healthcheck: {test: curl -f localhost, interval: 90s}
    depends_on: [b]
    restart: always
    stop_grace_period: 10s
    privileged: false
    security_opt: ['no-new-privileges:true']
    networks: {default: {aliases: [front]}}
    read_only: false
  b: {image: 'x:${TAG:-8}', x-godwit: {spread: preferred}}
",
    );
    assert_eq!(long, short);
    let a = &long.layers[&layer_name("a")];
    assert_eq!(a.environment["B"], "$x");
    assert_eq!(a.environment["IMAGES"], "/srv/images");
    assert_eq!(a.host_paths[0].source, "/srv/app/conf");
    assert_eq!((a.restart, a.stop_grace_ms, a.replicas), (RestartPolicy::Always, 10_000, 3));
    let health = HealthCheck {
        argv: ["/bin/sh", "-c", "curl -f localhost"].map(str::to_owned).to_vec(),
        interval_ms: 90_000,
        timeout_ms: 30_000,
        start_period_ms: 0,
        retries: 3,
    };
    assert_eq!(a.health, Some(health));
}

#[test]
fn restart_policies_and_switched_off_checks() {
    for (text, policy) in [
        ("no", RestartPolicy::No),
        ("on-failure", RestartPolicy::OnFailure { max_retries: None }),
        ("on-failure:5", RestartPolicy::OnFailure { max_retries: Some(5) }),
        ("unless-stopped", RestartPolicy::UnlessStopped),
    ] {
        let manifest = good(&format!("services: {{a: {{image: x, restart: '{text}'}}}}"));
        assert_eq!(manifest.layers[&layer_name("a")].restart, policy);
    }
    for check in ["{disable: true}", "{test: [NONE]}"] {
        assert_eq!(
            good(&format!("services: {{a: {{image: x, healthcheck: {check}}}}}")).layers[&layer_name("a")].health,
            None
        );
    }
}

#[test]
fn documents_that_are_none() {
    let cases = [
        "",
        "# nothing\n",
        "services",
        "services: {}",
        "services:\n\ta: {}",
        "services: [a]",
        "name: app",
        "services: {a: {image: x}}\n---\nservices: {}",
        "services: {a: {image: x}, a: {image: y}}",
        "services: {a: *nowhere}",
        "services: &s {a: *s}",
        "services: {a: !reset {image: x}}",
        "services:\n  a:\n    image: x\n   b: y",
        "services:\n  a: {image: x\n",
        "{[a]: b}",
        "x: {<<: 1}",
    ];
    let said: Vec<_> = cases.iter().map(|text| format!("{text:?}\n{}\n", errors(text))).collect();
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn unknown_keys_name_what_to_do() {
    insta::assert_snapshot!(errors(
        "version: '3.8'
nmae: app
x-other: 1
services:
  db:
    imgae: postgres
    memLimit: 1g
    build: .
    cap_add: [NET_ADMIN]
    zzz: 1
    deploy:
      replica: 2
      placement: {}
    healthcheck: {tset: true}
    x-godwit: {cloudlet: 1}
    ports: [{target: 1, published: 1, host_ip: 127.0.0.1}]
    depends_on: {web: {conditoin: service_healthy}}
  web: {image: x}
volumes:
  data: {external: true}
networks:
  front: {driver: overlay}
  back: {}
"
    ));
}

#[test]
fn wrong_values_are_said_with_their_places() {
    insta::assert_snapshot!(service_errors(
        "command: \"sh -c 'x\"
environment: {A: [1], NOT_SET: }
working_dir: srv
deploy: {replicas: -1, resources: {limits: {memory: 512, cpus: many}, reservations: {memory: 1q}}}
scale: 2
ports: ['80', '127.0.0.1:1:2', '0:1', '1-3:1-2', '1:1/sctp', 'x:y']
stop_signal: SIGNOPE
stop_grace_period: 10"
    ));
    insta::assert_snapshot!(service_errors(
        "volumes: [/data, 'd:/', 'd:/proc/x', 'd:/a:z', './x:/b', '~/x:/c', 'd:e', 'd:/a/../b', '-d:/x', {type: tmpfs, target: /t, source: d}]
tmpfs: ['/run:mode=1777', /dup, /dup/]
privileged: true
read_only: yes
restart: sometimes
ulimits: {nofile: {soft: 100, hard: 200}}"
    ));
    insta::assert_snapshot!(service_errors(
        "healthcheck: {test: [curl, x], interval: 1ms, timeout: 5, retries: 0}
mem_limit: 1g
cpus: 0
security_opt: ['seccomp:unconfined']
networks: [other]
image2: ''
x-godwit: {cloudlets: {reserved: 9, limit: 8}, spread: evenly}"
    ));
    insta::assert_snapshot!(service_errors(
        "mem_limit: 1g
mem_reservation: 2g
healthcheck: {interval: 10s}
x-godwit: {cloudlets: 0}
user: ${NOBODY}
labels: {a: '${X:?set me}', b: '${', c: $, d: '${EMPTY:?}'}"
    ));
    insta::assert_snapshot!(service_errors(
        "mem_limit: 1g\nx-godwit: {cloudlets: 2}\ndeploy: {resources: {reservations: {cpus: '1'}}}"
    ));
}

#[test]
fn services_are_checked_against_each_other() {
    insta::assert_snapshot!(errors(
        "name: Not_A_Name
services:
  a:
    image: x
    depends_on: [b, missing, bb]
    ports: ['80:80', '443:443']
    volumes: ['data:/d', 'dta:/e']
  b:
    image: x
    depends_on: {c: {condition: service_healthy}}
    ports: ['80:8080', '443:443/udp']
    volumes: ['data:/d']
    networks: {default: {aliases: [a, a-1, same]}}
  c:
    image: x
    depends_on: {a: {condition: service_completed_successfully}, none: {}}
    networks: {default: {aliases: [same]}}
  a-1: {image: x}
  a_b: {image: x}
  none: {image: x, scale: 0}
  self: {image: x, depends_on: [self]}
  empty:
volumes: {data: , 'bad/name': {driver: nfs}}
"
    ));
}

#[test]
fn there_is_a_bound_on_what_is_said_and_read() {
    let many: String = (0..50).map(|n| format!("    key{n}: 1\n")).collect();
    let text = format!("services:\n  a:\n    image: x\n{many}");
    let all = parse("f", &text, Some("app"), &vars()).unwrap_err();
    assert_eq!((all.errors.len(), all.left_out), (MAX_ERRORS, 50 - MAX_ERRORS));
    assert!(all.to_string().ends_with("… and 30 more"));
    assert_eq!((all.errors[0].line, all.errors[0].column, all.errors[0].path.as_str()), (4, 5, "services.a.key0"));

    assert!(errors(&format!("a: {}", "x".repeat(2 << 20))).contains("bytes"));
    assert!(errors(&format!("{}{}", "[".repeat(100), "]".repeat(100))).contains("nested"));
    let mut bomb = "x-0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for n in 1..20 {
        let before = n - 1;
        bomb += &format!("x-{n}: &a{n} [{}]\n", vec![format!("*a{before}"); 10].join(", "));
    }
    assert!(errors(&bomb).contains("values, counting repeated ones"));
    assert!(errors(&format!("services: {{{}}}", "a: &a {<<: *a}, ".repeat(3))).contains("alias"));
}

#[test]
fn a_name_is_needed_and_the_file_s_own_wins() {
    let text = "services: {a: {image: x}}";
    assert!(parse("f", text, None, &vars()).unwrap_err().to_string().contains("the environment has no name"));
    assert_eq!(good(text).name.as_str(), "app");
    assert_eq!(good("name: own\nservices: {a: {image: x}}").name.as_str(), "own");
    assert!(parse("f", text, Some("Bad_Name"), &vars()).is_err());
}

/// Pieces of which a broken manifest might be made.
fn scrap() -> impl Strategy<Value = String> {
    let pieces = [
        "services",
        "volumes",
        "a",
        "db",
        "image",
        "ports",
        "deploy",
        "healthcheck",
        "test",
        "depends_on",
        "x-godwit",
        ":",
        ": ",
        "- ",
        "\n",
        "\n  ",
        "\n    ",
        "\n      ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "'",
        "\"",
        "&x ",
        "*x",
        "<<",
        "|\n",
        ">",
        "!t ",
        "---\n",
        "...\n",
        "#",
        "?",
        "%",
        "@",
        "\t",
        "${",
        "$$",
        "$A",
        "8080:80",
        "1m",
        "~",
        "é",
        "\u{0}",
        "\u{feff}",
        "\r\n",
    ];
    prop_oneof![4 => prop::sample::select(pieces.to_vec()).prop_map(str::to_owned), 1 => ".{0,4}"]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_it_panic(scraps in prop::collection::vec(scrap(), 0..40)) {
        let _ = parse("f", &scraps.concat(), Some("app"), &vars());
    }

    #[test]
    fn a_good_file_with_one_wrong_piece_makes_no_panic(at in 0..1464_usize, cut in 0..12_usize, scrap in scrap()) {
        let text = include_str!("../../../examples/shop.yaml");
        let index = |at: usize| (at.min(text.len())..=text.len()).find(|i| text.is_char_boundary(*i)).unwrap();
        let broken = format!("{}{scrap}{}", &text[..index(at)], &text[index(at + cut)..]);
        if let Err(errors) = parse("f", &broken, Some("app"), &vars()) {
            prop_assert!(!errors.errors.is_empty());
            // YAML ends lines with a carriage return too.
            let lines = broken.split(['\n', '\r']).count() + 1;
            prop_assert!(errors.errors.iter().all(|e| e.line >= 1 && e.line <= lines));
        }
    }
}
