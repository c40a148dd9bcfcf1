//! What the state directory keeps: the store, the authority, the join token, the admin's identity.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use godwit_api::tls::{Authority, Identity, JoinToken, write_private};
use godwit_store::SqliteStore;
use rustls::crypto::ring;

use super::RunError;

const TOKEN_BYTES: usize = 32;

pub struct Kept {
    pub store: SqliteStore,
    pub authority: Authority,
    pub join_token: String,
    /// The listener's own; made anew by every start.
    pub identity: Identity,
}

impl Kept {
    /// Opens everything, makes what is missing. Blocks for disk work.
    pub fn open(dir: &Path) -> Result<Self, RunError> {
        let failed = |source| RunError::StateDir { path: dir.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        // First: it is locked, so what follows is done by one process.
        let store = SqliteStore::open(&dir.join("state.db"))?;
        let authority = Authority::open(&dir.join("ca"))?;
        keep_admin(&dir.join("admin"), &authority)?;
        let join_token = join_token(&dir.join("join-token"), authority.ca_pem())?;
        let identity = authority.controller_identity()?;
        Ok(Self { store, authority, join_token, identity })
    }
}

/// The identity of people elsewhere; another authority's would be of no use.
fn keep_admin(dir: &Path, authority: &Authority) -> Result<(), RunError> {
    match Identity::load(dir)? {
        Some(admin) if admin.ca_pem == authority.ca_pem() => Ok(()),
        _ => Ok(authority.admin_identity()?.save(dir)?),
    }
}

/// The token for new hosts, made once; the file also tells them whom to trust.
fn join_token(path: &Path, ca_pem: &str) -> Result<String, RunError> {
    let kept = match std::fs::read(path) {
        Ok(bytes) => {
            let wrong = |source| RunError::TokenFormat { path: path.to_owned(), source };
            Some(serde_json::from_slice::<JoinToken>(&bytes).map_err(wrong)?)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(RunError::TokenFile { path: path.to_owned(), source }),
    };
    let kept = match kept {
        Some(kept) if kept.controller_ca_pem == ca_pem => return Ok(kept.token),
        other => other.map_or_else(random_token, |kept| Ok(kept.token))?,
    };
    let file = JoinToken { controller_ca_pem: ca_pem.to_owned(), token: kept.clone() };
    let text =
        serde_json::to_string(&file).map_err(|source| RunError::TokenFormat { path: path.to_owned(), source })?;
    write_private(path, &text)?;
    Ok(kept)
}

fn random_token() -> Result<String, RunError> {
    let mut bytes = [0u8; TOKEN_BYTES];
    ring::default_provider().secure_random.fill(&mut bytes).map_err(|_| RunError::Random)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_is_made_once_stays() {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().join("state");
        let first = Kept::open(&dir).unwrap();
        assert_eq!(first.join_token.len(), 2 * TOKEN_BYTES);
        let admin = Identity::load(&dir.join("admin")).unwrap().unwrap();
        let (token, ca) = (first.join_token.clone(), first.authority.ca_pem().to_owned());
        drop(first);
        let second = Kept::open(&dir).unwrap();
        assert_eq!((second.join_token.as_str(), second.authority.ca_pem()), (token.as_str(), ca.as_str()));
        assert!(Identity::load(&dir.join("admin")).unwrap().unwrap() == admin);
        assert_eq!(std::fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        assert_eq!(std::fs::metadata(dir.join("join-token")).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_token_is_named() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("join-token"), "{").unwrap();
        let error = Kept::open(directory.path()).err().unwrap();
        assert!(error.to_string().contains("join-token"), "{error}");
    }
}
