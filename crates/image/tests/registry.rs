//! Pulling from the real Debian `docker-registry`, images pushed there by `skopeo`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
use common::*;
use godwit_image::{FetchError, ImageSource, PullError, PullOptions, PullPolicy, RegistryAuth, RegistryTls};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// User ann, password `secret`, bcrypt with cost 4: what `htpasswd -nbB -C 4` prints.
const HTPASSWD: &str = "ann:$2b$04$RSp7HIOX00sTL.svE1Jq5OmWJdPXUv5Y84uG4N8ShVb5WD2qnU7eC\n";

/// A registry of this test, on a port of its own, ended with it.
struct Registry {
    child: Child,
    address: String,
    /// Access log: one line per request.
    requests: Arc<(Mutex<Vec<String>>, Condvar)>,
    dir: tempfile::TempDir,
    ca_pem: Option<String>,
    creds: Option<&'static str>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// None, and a word about it, where a test cannot run.
fn registry(tls: bool, auth: bool) -> Option<Registry> {
    if not_root() {
        return None;
    }
    for program in ["docker-registry", "skopeo"] {
        if Command::new(program).arg("--version").stdout(Stdio::null()).status().is_err() {
            eprintln!("skipped: needs {program}");
            return None;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let mut config = format!(
        "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n",
        at("data")
    );
    let mut ca_pem = None;
    if tls {
        let key = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into(), "localhost".into()]).unwrap();
        std::fs::create_dir(dir.path().join("certs")).unwrap();
        std::fs::write(at("certs/ca.crt"), key.cert.pem()).unwrap();
        std::fs::write(at("key.pem"), key.signing_key.serialize_pem()).unwrap();
        config += &format!("  tls:\n    certificate: {}\n    key: {}\n", at("certs/ca.crt"), at("key.pem"));
        ca_pem = Some(key.cert.pem());
    }
    if auth {
        std::fs::write(at("htpasswd"), HTPASSWD).unwrap();
        config += &format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", at("htpasswd"));
    }
    std::fs::write(at("config.yml"), config).unwrap();
    let mut child = Command::new("docker-registry")
        .args(["serve", &at("config.yml")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let requests = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
    let (log, access) = (child.stderr.take().unwrap(), child.stdout.take().unwrap());
    let seen = Arc::clone(&requests);
    std::thread::spawn(move || {
        BufReader::new(access).lines().map_while(Result::ok).for_each(|line| {
            seen.0.lock().unwrap().push(line);
            seen.1.notify_all();
        })
    });
    let (send, port) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(log).lines().map_while(Result::ok) {
            if let Some((_, rest)) = line.split_once("listening on ") {
                let address: String =
                    rest.chars().take_while(|c| c.is_ascii_digit() || matches!(c, '.' | ':')).collect();
                let _ = send.send(address);
            }
        }
    });
    let mut registry =
        Registry { child, address: String::new(), requests, dir, ca_pem, creds: auth.then_some("ann:secret") };
    registry.address = port.recv_timeout(Duration::from_secs(20)).expect("docker-registry did not start");
    Some(registry)
}

impl Registry {
    fn source(&self, rest: &str) -> ImageSource {
        format!("{}/{rest}", self.address).parse().unwrap()
    }

    fn options(&self) -> PullOptions {
        let tls = match &self.ca_pem {
            Some(pem) => RegistryTls::Verify { extra_ca_pem: Some(pem.clone().into()) },
            None => RegistryTls::Insecure,
        };
        let auth = match self.creds {
            Some(_) => RegistryAuth::Basic { user: "ann".into(), password: "secret".into() },
            None => RegistryAuth::Anonymous,
        };
        PullOptions { auth, tls, ..Default::default() }
    }

    fn push(&self, layout: &Layout, tag: &str, to: &str) {
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["copy", "--quiet", "--insecure-policy"]);
        match &self.ca_pem {
            Some(_) => skopeo.arg("--dest-cert-dir").arg(self.dir.path().join("certs")),
            None => skopeo.arg("--dest-tls-verify=false"),
        };
        if let Some(creds) = self.creds {
            skopeo.args(["--dest-creds", creds]);
        }
        let from = format!("oci:{}:{tag}", layout.dir.path().display());
        let out = skopeo.args([from, format!("docker://{}/{to}", self.address)]).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }

    /// GET requests whose path contains `part`, once at least `least` are in the log and so is one
    /// that was made after all of them. The registry logs a request when it is done with it.
    async fn gets(&self, part: &str, least: usize) -> usize {
        let marker = format!("app:marker-{}", self.requests.0.lock().unwrap().len());
        let absent = fixture().ensure(&self.source(&marker), &self.options()).await.unwrap_err();
        assert!(matches!(absent, PullError::Fetch { source: FetchError::NotFound { .. }, .. }), "{}", chain(&absent));
        let count = |lines: &[String], part: &str| {
            lines.iter().filter(|line| line.contains("\"GET ") && line.contains(part)).count()
        };
        let marker = marker.replace("app:", "manifests/");
        let missing = |lines: &mut Vec<String>| count(lines, &marker) == 0 || count(lines, part) < least;
        let (lines, log) = &*self.requests;
        let (lines, waited) = log.wait_timeout_while(lines.lock().unwrap(), Duration::from_secs(10), missing).unwrap();
        assert!(!waited.timed_out(), "{lines:#?}");
        count(&lines, part)
    }

    /// Where the registry keeps a blob's content.
    fn blob_data(&self, digest: godwit_image::Digest) -> PathBuf {
        let hex = digest.hex();
        self.dir.path().join("data/docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
    }
}

fn sample() -> (Layout, Vec<Layer>) {
    let noise: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2654435761) >> 15) as u8).collect();
    let tar = archive(&[file("noise", noise), symlink("l", "noise")]);
    let top = archive(&[file("top", "2"), file(".wh.l", "")]);
    let layers = vec![
        from_blob(gzip(&tar), &tar, "application/vnd.oci.image.layer.v1.tar+gzip"),
        // Compressed too, or skopeo would do it and change the digest.
        from_blob(gzip(&top), &top, "application/vnd.oci.image.layer.v1.tar+gzip"),
    ];
    let mut layout = Layout::new();
    layout.image("1", &layers);
    (layout, layers)
}

async fn pull_by_tag_and_digest(registry: Registry) {
    let (layout, layers) = sample();
    registry.push(&layout, "1", "team/app:1");
    let fixture = fixture();
    let (source, options) = (registry.source("team/app:1"), registry.options());
    let image = fixture.ensure(&source, &options).await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(image.reference, source.to_string());
    assert_eq!(std::fs::read(image.layers[1].join("top")).unwrap(), b"2");
    assert_eq!(std::fs::metadata(image.layers[0].join("noise")).unwrap().len(), 3_000_000);
    let asked = registry.gets("team/app", 4).await;
    // What is here is not asked for again, by tag or by digest.
    assert_eq!(fixture.ensure(&source, &options).await.unwrap(), image);
    let pinned = registry.source(&format!("team/app@{}", image.digest));
    assert_eq!(fixture.ensure(&pinned, &options).await.unwrap().layers, image.layers);
    assert_eq!(registry.gets("team/app", 4).await, asked);

    let other = common::fixture();
    assert_eq!(other.ensure(&pinned, &options).await.unwrap().digest, image.digest);

    // A tag that moved is followed only if the registry is asked.
    let mut second = Layout::new();
    second.image("2", &[layers[0].clone()]);
    registry.push(&second, "2", "team/app:1");
    assert_eq!(fixture.ensure(&source, &options).await.unwrap().digest, image.digest);
    let always = PullOptions { policy: PullPolicy::Always, ..options.clone() };
    let moved = fixture.ensure(&source, &always).await.unwrap();
    assert_ne!(moved.digest, image.digest);
    assert_eq!(moved.layers, image.layers[..1]);

    let absent = fixture.ensure(&registry.source("team/app:9"), &options).await.unwrap_err();
    assert!(matches!(absent, PullError::Fetch { source: FetchError::NotFound { .. }, .. }), "{}", chain(&absent));
    fixture.assert_clean();
}

#[tokio::test]
async fn plain() {
    let Some(registry) = registry(false, false) else { return };
    pull_by_tag_and_digest(registry).await;
}

#[tokio::test]
async fn tls_and_password() {
    let Some(registry) = registry(true, true) else { return };
    pull_by_tag_and_digest(registry).await;
}

#[tokio::test]
async fn refused_logins_and_certificates() {
    let Some(registry) = registry(true, true) else { return };
    let (layout, _) = sample();
    registry.push(&layout, "1", "app:1");
    let (fixture, source) = (fixture(), registry.source("app:1"));
    let get = async |options: PullOptions| match fixture.ensure(&source, &options).await {
        Err(PullError::Fetch { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    let wrong = RegistryAuth::Basic { user: "ann".into(), password: "guess".into() };
    let error = get(PullOptions { auth: wrong, ..registry.options() }).await;
    assert!(matches!(&error, FetchError::WrongPassword { user, .. } if user == "ann"), "{error:?}");
    assert!(!chain(&error).contains("guess"));
    let error = get(PullOptions { auth: RegistryAuth::Anonymous, ..registry.options() }).await;
    assert!(matches!(error, FetchError::LoginNeeded { .. }), "{error:?}");
    // The certificate is nobody's that this host knows.
    let error = get(PullOptions { tls: RegistryTls::default(), ..registry.options() }).await;
    assert!(
        matches!(error, FetchError::Transport { .. }) && chain(&error).contains("certificate"),
        "{}",
        chain(&error)
    );
    let error = get(PullOptions { tls: RegistryTls::Insecure, ..registry.options() }).await;
    assert!(chain(&error).contains("HTTP"), "{}", chain(&error));
    let junk = RegistryTls::Verify {
        extra_ca_pem: Some(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_vec()),
    };
    let error = get(PullOptions { tls: junk, ..registry.options() }).await;
    assert!(matches!(error, FetchError::Ca(_) | FetchError::Setup { .. }), "{error:?}");
    fixture.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_pulls_download_a_layer_once() {
    let Some(registry) = registry(false, false) else { return };
    let (layout, layers) = sample();
    registry.push(&layout, "1", "app:1");
    registry.push(&layout, "1", "mirror/app:1");
    let fixture = fixture();
    let pulls: Vec<_> = ["app:1", "app:1", "app:1", "mirror/app:1"]
        .into_iter()
        .map(|name| {
            let (store, source, options) = (fixture.store.clone(), registry.source(name), registry.options());
            tokio::spawn(async move { store.ensure(&source, &options, &godwit_image::NoProgress).await.unwrap() })
        })
        .collect();
    let images = futures_util::future::join_all(pulls).await;
    assert!(images.iter().all(|image| image.as_ref().unwrap().digest == images[0].as_ref().unwrap().digest));
    for layer in &layers {
        assert_eq!(registry.gets(&layer.digest.to_string(), 1).await, 1);
    }
    fixture.assert_clean();
}

#[tokio::test]
async fn a_registry_whose_blob_changed() {
    let Some(registry) = registry(false, false) else { return };
    let (layout, layers) = sample();
    registry.push(&layout, "1", "app:1");
    let data = registry.blob_data(layers[0].digest);
    let mut bytes = std::fs::read(&data).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&data, bytes).unwrap();
    let fixture = fixture();
    let error = fixture.ensure(&registry.source("app:1"), &registry.options()).await.unwrap_err();
    assert!(
        matches!(&error, PullError::Unpack { layer, source: godwit_image::UnpackError::BlobDigest { .. }, .. } if *layer == layers[0].digest),
        "{}",
        chain(&error)
    );
    fixture.assert_clean();
}

#[tokio::test]
async fn nobody_listens() {
    if not_root() {
        return;
    }
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let fixture = fixture();
    let options = PullOptions { tls: RegistryTls::Insecure, ..Default::default() };
    let error = fixture.ensure(&format!("{free}/app:1").parse().unwrap(), &options).await.unwrap_err();
    assert!(matches!(error, PullError::Fetch { source: FetchError::Transport { .. }, .. }));
    assert!(chain(&error).contains("refused"), "{}", chain(&error));
}
