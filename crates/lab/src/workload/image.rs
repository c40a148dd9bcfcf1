//! An OCI image layout (opencontainers/image-spec, "image-layout.md") that holds one program and
//! the shared libraries it needs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};

/// Directories that an image has beside those of its files. `/data` is for volumes.
const DIRECTORIES: [&str; 10] = ["data", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "var"];

/// An image that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("cannot {step} {}", .path.display())]
    Io { step: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is there already: an image layout is written into a new directory", .0.display())]
    Exists(PathBuf),
    #[error("cannot list the shared libraries of {}: {message}", .binary.display())]
    Libraries { binary: PathBuf, message: String },
}

#[derive(Debug, Clone, clap::Args)]
pub struct ImageArgs {
    /// Directory to write the layout to; must not exist
    #[arg(long)]
    pub out: PathBuf,
    /// Name of the image in the layout's index
    #[arg(long, default_value = "workload")]
    pub tag: String,
}

impl ImageArgs {
    pub(crate) fn run(&self, own_prefix: &[&str]) -> Result<ImageSummary, ImageError> {
        let own = std::env::current_exe().map_err(|source| ImageError::Io {
            step: "find",
            path: PathBuf::from("/proc/self/exe"),
            source,
        })?;
        write_image(&own, own_prefix, &self.out, &self.tag)
    }
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct ImageSummary {
    pub directory: PathBuf,
    pub tag: String,
    /// Of the manifest, as `sha256:…`.
    pub digest: String,
    pub layer_bytes: u64,
    /// Paths of the program and its libraries inside the image.
    pub files: Vec<PathBuf>,
}

/// Writes `binary` as `/usr/bin/NAME` with its libraries into a new OCI layout at `directory`.
/// The entry point is the program followed by `arguments`.
pub fn write_image(binary: &Path, arguments: &[&str], directory: &Path, tag: &str) -> Result<ImageSummary, ImageError> {
    let at = |step: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| ImageError::Io { step, path, source }
    };
    match fs::create_dir(directory) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(ImageError::Exists(directory.to_owned())),
        Err(source) => return Err(at("make", directory)(source)),
    }
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).map_err(at("make", &blobs))?;

    let name = binary.file_name().map_or_else(|| "program".into(), |n| n.to_string_lossy().into_owned());
    let inside = PathBuf::from(format!("/usr/bin/{name}"));
    // Inside the image each library has the path under which the loader looks for it.
    let mut files: BTreeMap<PathBuf, PathBuf> = libraries(binary)?.into_iter().map(|p| (p.clone(), p)).collect();
    files.insert(inside.clone(), binary.to_owned());

    let temporary = blobs.join("layer.tmp");
    let layer_digest = write_layer(&temporary, &files).map_err(at("write", &temporary))?;
    let layer_bytes = fs::metadata(&temporary).map_err(at("look at", &temporary))?.len();
    fs::rename(&temporary, blobs.join(&layer_digest)).map_err(at("rename", &temporary))?;

    let put = |value: &serde_json::Value| -> Result<(String, usize), ImageError> {
        let bytes = value.to_string().into_bytes();
        let digest = hex(&Sha256::digest(&bytes));
        let path = blobs.join(&digest);
        fs::write(&path, &bytes).map_err(at("write", &path))?;
        Ok((digest, bytes.len()))
    };
    let mut entrypoint = vec![inside.to_string_lossy().into_owned()];
    entrypoint.extend(arguments.iter().map(|a| (*a).to_owned()));
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let (config, config_bytes) = put(&json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Entrypoint": entrypoint, "WorkingDir": "/", "Env": ["PATH=/usr/bin:/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer_digest}")] },
    }))?;
    let (manifest, manifest_bytes) = put(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": format!("sha256:{config}"), "size": config_bytes },
        "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": format!("sha256:{layer_digest}"), "size": layer_bytes }],
    }))?;
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": format!("sha256:{manifest}"),
            "size": manifest_bytes,
            "platform": { "architecture": architecture, "os": "linux" },
            "annotations": { "org.opencontainers.image.ref.name": tag },
        }],
    });
    for (file, text) in
        [("oci-layout", json!({ "imageLayoutVersion": "1.0.0" }).to_string()), ("index.json", index.to_string())]
    {
        let path = directory.join(file);
        fs::write(&path, text).map_err(at("write", &path))?;
    }
    Ok(ImageSummary {
        directory: directory.to_owned(),
        tag: tag.to_owned(),
        digest: format!("sha256:{manifest}"),
        layer_bytes,
        files: files.into_keys().collect(),
    })
}

/// The shared libraries of a program and its loader, by ldd(1), which runs the program's own
/// loader: for programs that are trusted anyway.
fn libraries(binary: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let wrong = |message: String| ImageError::Libraries { binary: binary.to_owned(), message };
    let output = Command::new("ldd").arg(binary).output().map_err(|e| wrong(format!("ldd does not start: {e}")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        if (complaint + &text).contains("not a dynamic executable") {
            return Ok(Vec::new());
        }
        return Err(wrong(format!("ldd ends with {}", output.status)));
    }
    parse_ldd(&text).map_err(wrong)
}

/// Lines are `NAME => PATH (ADDRESS)`, `PATH (ADDRESS)` for the loader, `NAME (ADDRESS)` for the
/// kernel's own page, `NAME => not found`, or `statically linked`.
fn parse_ldd(text: &str) -> Result<Vec<PathBuf>, String> {
    let mut paths = Vec::new();
    for line in text.lines().map(str::trim) {
        let (name, place) = line.split_once(" => ").unwrap_or((line, line));
        if place == "not found" {
            return Err(format!("{name} is not found"));
        }
        if let Some((path, _)) = place.split_once(" (")
            && path.starts_with('/')
        {
            paths.push(PathBuf::from(path));
        }
    }
    Ok(paths)
}

/// Writes the layer; returns its SHA-256 in hexadecimal. Owners and times are the same wherever it
/// is written, so the same program gives the same image.
fn write_layer(path: &Path, files: &BTreeMap<PathBuf, PathBuf>) -> io::Result<String> {
    let mut builder = tar::Builder::new(Hashing { inner: BufWriter::new(File::create(path)?), hash: Sha256::new() });
    let mut directories: Vec<PathBuf> = DIRECTORIES.iter().map(PathBuf::from).collect();
    directories.extend(files.keys().filter_map(|f| Some(f.parent()?.strip_prefix("/").ok()?.to_owned())));
    let mut all: Vec<PathBuf> = directories
        .iter()
        .flat_map(|d| d.ancestors().map(Path::to_owned))
        .filter(|d| !d.as_os_str().is_empty())
        .collect();
    all.sort();
    all.dedup();
    let header = |kind: tar::EntryType, size: u64, mode: u32| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header
    };
    for directory in &all {
        let mode = if directory == Path::new("tmp") { 0o1777 } else { 0o755 };
        builder.append_data(&mut header(tar::EntryType::Directory, 0, mode), directory, io::empty())?;
    }
    for (inside, source) in files {
        let file = File::open(source)?;
        let size = file.metadata()?.len();
        let name = inside.strip_prefix("/").unwrap_or(inside);
        builder.append_data(&mut header(tar::EntryType::Regular, size, 0o755), name, file.take(size))?;
    }
    let mut out = builder.into_inner()?;
    out.flush()?;
    Ok(hex(&out.hash.finalize()))
}

struct Hashing<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(data)?;
        self.hash.update(&data[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ldd_lines() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            parse_ldd(text).unwrap(),
            [Path::new("/lib/x86_64-linux-gnu/libc.so.6"), Path::new("/lib64/ld-linux-x86-64.so.2")]
        );
        assert_eq!(parse_ldd("\tstatically linked\n").unwrap(), Vec::<PathBuf>::new());
        assert!(parse_ldd("\tlibx.so => not found\n").is_err());
    }
}
