//! An OCI image layout on disk (image-spec, image-layout.md): a directory, or a tar archive of one.

use super::{BlobReader, FetchError};
use crate::digest::Digest;
use crate::limits::MAX_MANIFEST_BYTES;
use crate::unpack::{Kind, TarReader};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;

/// Most members of a layout's archive.
const MAX_MEMBERS: usize = 100_000;

type Members = HashMap<String, (u64, u64)>;

pub(crate) struct Layout {
    path: PathBuf,
    /// In an archive: each regular member's offset and length, bytes. In a directory: none.
    members: Option<Arc<Members>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    image_layout_version: String,
}

impl Layout {
    pub async fn open(path: PathBuf) -> Result<Layout, FetchError> {
        blocking(move || {
            let kind = std::fs::metadata(&path).map_err(|source| FetchError::File { path: path.clone(), source })?;
            let members = if kind.is_dir() { None } else { Some(Arc::new(members(&path)?)) };
            let layout = Layout { path, members };
            let refuse = |why: String| FetchError::NoLayout { path: layout.path.clone(), why };
            let marker =
                layout.read("oci-layout", 4096)?.ok_or_else(|| refuse("the file oci-layout is missing".into()))?;
            match serde_json::from_slice::<Marker>(&marker) {
                Ok(marker) if marker.image_layout_version.starts_with("1.") => Ok(layout),
                Ok(marker) => Err(refuse(format!("its version is {:?}, not 1.x", marker.image_layout_version))),
                Err(error) => Err(refuse(format!("the file oci-layout is malformed: {error}"))),
            }
        })
        .await
    }

    pub async fn index(&self) -> Result<Vec<u8>, FetchError> {
        let layout = self.again();
        blocking(move || {
            let why = || FetchError::NoLayout { path: layout.path.clone(), why: "index.json is missing".into() };
            layout.read("index.json", MAX_MANIFEST_BYTES)?.ok_or_else(why)
        })
        .await
    }

    pub async fn small(&self, digest: Digest, max: u64) -> Result<Vec<u8>, FetchError> {
        let layout = self.again();
        blocking(move || {
            let missing = || FetchError::NoBlob { path: layout.path.clone(), digest };
            layout.read(&blob_name(digest), max)?.ok_or_else(missing)
        })
        .await
    }

    pub async fn blob(&self, digest: Digest) -> Result<BlobReader, FetchError> {
        let layout = self.again();
        blocking(move || {
            let missing = || FetchError::NoBlob { path: layout.path.clone(), digest };
            Ok(BlobReader::File(layout.member(&blob_name(digest))?.ok_or_else(missing)?))
        })
        .await
    }

    /// For another thread.
    fn again(&self) -> Layout {
        Layout { path: self.path.clone(), members: self.members.clone() }
    }

    fn read(&self, name: &str, max: u64) -> Result<Option<Vec<u8>>, FetchError> {
        let Some(file) = self.member(name)? else { return Ok(None) };
        let mut bytes = Vec::new();
        let read = file.take(max + 1).read_to_end(&mut bytes);
        read.map_err(|source| FetchError::File { path: self.path.join(name), source })?;
        if bytes.len() as u64 > max {
            return Err(FetchError::TooLong { what: name.into(), max });
        }
        Ok(Some(bytes))
    }

    /// A file of the layout, from its start to its end.
    fn member(&self, name: &str) -> Result<Option<io::Take<File>>, FetchError> {
        let path = if self.members.is_some() { self.path.clone() } else { self.path.join(name) };
        let failed = |source| FetchError::File { path: path.clone(), source };
        let (offset, length) = match &self.members {
            None => {
                match std::fs::metadata(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(failed(error)),
                    // A fifo would block for ever.
                    Ok(kind) if !kind.is_file() => return Err(failed(io::Error::other("not a regular file"))),
                    Ok(_) => {}
                }
                (0, u64::MAX)
            }
            Some(members) => match members.get(name) {
                None => return Ok(None),
                Some(&place) => place,
            },
        };
        let mut file = File::open(&path).map_err(failed)?;
        if offset > 0 {
            file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        }
        Ok(Some(file.take(length)))
    }
}

fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn members(path: &PathBuf) -> Result<Members, FetchError> {
    let file = File::open(path).map_err(|source| FetchError::File { path: path.clone(), source })?;
    let mut reader = TarReader::new(file);
    let mut members = HashMap::new();
    while let Some(entry) = reader.next().map_err(|source| FetchError::LayoutArchive { path: path.clone(), source })? {
        if entry.kind != Kind::File || entry.sparse.is_some() {
            continue;
        }
        if members.len() == MAX_MEMBERS {
            return Err(FetchError::NoLayout {
                path: path.clone(),
                why: format!("it has more than {MAX_MEMBERS} members"),
            });
        }
        if let Ok(name) = String::from_utf8(entry.path) {
            let name = name.trim_start_matches("./").to_owned();
            members.insert(name, (reader.position(), entry.stored));
        }
    }
    Ok(members)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FetchError> + Send + 'static,
) -> Result<T, FetchError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(failed) if failed.is_panic() => std::panic::resume_unwind(failed.into_panic()),
        Err(_) => Err(FetchError::Stopped),
    }
}
