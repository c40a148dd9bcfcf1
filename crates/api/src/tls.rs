//! Who is who: the controller's own certificate authority, identities of hosts, and TLS 1.3 settings made from them.
//!
//! ```text
//! host name        certificate's only DNS name    who may show it
//! h1               h1.hosts.godwit                the agent of h1, as client and as server of moves
//! –                controller.godwit              the controller's listener
//! –                admin.godwit                   a person's remote client
//! ```
//! Names are checked, addresses are not: a host keeps its identity wherever it answers. The crypto provider (ring) is
//! named in every configuration, so nothing depends on what a process installed as its default.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use godwit_model::HostName;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

const CONTROLLER_NAME: &str = "controller.godwit";
const ADMIN_NAME: &str = "admin.godwit";
const HOST_SUFFIX: &str = ".hosts.godwit";

/// Why keys, certificates or the settings made from them could not be had.
#[derive(Debug, Error)]
pub enum TlsError {
    #[error("{} could not be {doing}", path.display())]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("a key could not be made")]
    Generate { source: rcgen::Error },
    #[error("{what} cannot be read as PEM; restore it from a backup, or remove the directory it is in and join again")]
    Pem { what: &'static str, source: rustls_pki_types::pem::Error },
    #[error("the certificate authority in {} cannot be used", path.display())]
    Authority { path: PathBuf, source: rcgen::Error },
    #[error("the certificate signing request is not one; make it with a current agent")]
    Request { source: rcgen::Error },
    #[error("the certificate could not be signed")]
    Sign { source: rcgen::Error },
    #[error("the certificates do not make a TLS configuration")]
    Config { source: rustls::Error },
    #[error("the authority's certificate does not make a verifier")]
    Verifier { source: rustls::server::VerifierBuilderError },
    #[error("the peer's certificate cannot be read")]
    Peer { source: webpki::Error },
    #[error("the peer's certificate names {names:?}; one name of this installation was expected")]
    PeerName { names: Vec<String> },
}

/// Who is on the other side of a connection, as its certificate says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PeerName {
    Host(HostName),
    Controller,
    /// A person with the controller's `admin` certificate.
    Admin,
}

/// What the controller writes as `join-token` in its state directory, and a new agent reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    pub controller_ca_pem: String,
    /// 64 hexadecimal digits.
    pub token: String,
}

/// A private key, the certificate for it, and the authority to trust; all PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    pub certificate_pem: String,
    pub key_pem: String,
    pub ca_pem: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Identity(…)")
    }
}

/// The certificate authority of one installation. Its key never leaves the controller's state directory.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
}

impl Authority {
    /// Reads `ca.key` and `ca.crt` in `dir`, or makes both (mode 0600) where neither exists.
    pub fn open(dir: &Path) -> Result<Self, TlsError> {
        make_directory(dir)?;
        let (key_path, certificate_path) = (dir.join("ca.key"), dir.join("ca.crt"));
        let unusable = |source| TlsError::Authority { path: dir.to_owned(), source };
        // The certificate is written last: with it, the pair is complete.
        if let Some(ca_pem) = read_if_there(&certificate_path)? {
            let key_pem = read(&key_path)?;
            let key = KeyPair::from_pem(&key_pem).map_err(unusable)?;
            let issuer = Issuer::from_ca_cert_pem(&ca_pem, key).map_err(unusable)?;
            return Ok(Self { issuer, ca_pem });
        }
        let key = generate_key()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "godwit authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key).map_err(|source| TlsError::Sign { source })?;
        write_private(&key_path, &key.serialize_pem())?;
        write_private(&certificate_path, &certificate.pem())?;
        Ok(Self { issuer: Issuer::new(params, key), ca_pem: certificate.pem() })
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// A certificate (PEM) for the request's key and this host's name. Of the request only the key is used: whatever
    /// names or rights it asks for are not granted. Its signature proves that the asker holds the key.
    pub fn sign_csr(&self, csr_pem: &str, host: &HostName) -> Result<String, TlsError> {
        let request =
            CertificateSigningRequestParams::from_pem(csr_pem).map_err(|source| TlsError::Request { source })?;
        self.sign(&request.public_key, &host_dns_name(host))
    }

    /// A new identity of the controller's listener.
    pub fn controller_identity(&self) -> Result<Identity, TlsError> {
        self.identity(CONTROLLER_NAME)
    }

    /// A new identity for a person's remote client.
    pub fn admin_identity(&self) -> Result<Identity, TlsError> {
        self.identity(ADMIN_NAME)
    }

    fn identity(&self, dns_name: &str) -> Result<Identity, TlsError> {
        let key = generate_key()?;
        let certificate_pem = self.sign(&key, dns_name)?;
        Ok(Identity { certificate_pem, key_pem: key.serialize_pem(), ca_pem: self.ca_pem.clone() })
    }

    fn sign(&self, key: &impl PublicKeyData, dns_name: &str) -> Result<String, TlsError> {
        let sign = |source| TlsError::Sign { source };
        let mut params = CertificateParams::new(vec![dns_name.to_owned()]).map_err(sign)?;
        params.distinguished_name.push(DnType::CommonName, dns_name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(key, &self.issuer).map_err(sign)?.pem())
    }
}

impl Identity {
    /// Reads `identity.crt`, `identity.key` and `ca.crt` in `dir`; `None` if there is no certificate yet.
    pub fn load(dir: &Path) -> Result<Option<Self>, TlsError> {
        let Some(certificate_pem) = read_if_there(&dir.join("identity.crt"))? else { return Ok(None) };
        let key_pem = read(&dir.join("identity.key"))?;
        let ca_pem = read(&dir.join("ca.crt"))?;
        Ok(Some(Self { certificate_pem, key_pem, ca_pem }))
    }

    /// Writes the three files (mode 0600), the certificate last, so that half an identity is none.
    pub fn save(&self, dir: &Path) -> Result<(), TlsError> {
        make_directory(dir)?;
        write_private(&dir.join("identity.key"), &self.key_pem)?;
        write_private(&dir.join("ca.crt"), &self.ca_pem)?;
        write_private(&dir.join("identity.crt"), &self.certificate_pem)
    }

    /// SHA-256 of the certificate (DER), as hexadecimal digits.
    pub fn certificate_sha256(&self) -> Result<String, TlsError> {
        Ok(certificate_sha256(&self.certificate()?))
    }

    fn certificate(&self) -> Result<CertificateDer<'static>, TlsError> {
        CertificateDer::from_pem_slice(self.certificate_pem.as_bytes())
            .map_err(|source| TlsError::Pem { what: "the certificate", source })
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())
            .map_err(|source| TlsError::Pem { what: "the private key", source })
    }
}

/// Whether a server insists on a client certificate. One that is shown is always checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificate {
    Required,
    Optional,
}

/// A server with this identity, for clients of the same authority.
pub fn server_config(identity: &Identity, clients: ClientCertificate) -> Result<ServerConfig, TlsError> {
    let roots = Arc::new(roots(&identity.ca_pem)?);
    let mut verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
    if clients == ClientCertificate::Optional {
        verifier = verifier.allow_unauthenticated();
    }
    let verifier = verifier.build().map_err(|source| TlsError::Verifier { source })?;
    ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| TlsError::Config { source })?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate()?], identity.key()?)
        .map_err(|source| TlsError::Config { source })
}

/// A client that shows this identity and trusts servers of the same authority.
pub fn client_config(identity: &Identity) -> Result<ClientConfig, TlsError> {
    client_builder(&identity.ca_pem)?
        .with_client_auth_cert(vec![identity.certificate()?], identity.key()?)
        .map_err(|source| TlsError::Config { source })
}

/// A client without identity yet, that trusts the authority named in the join token and nobody else.
pub fn join_client_config(ca_pem: &str) -> Result<ClientConfig, TlsError> {
    Ok(client_builder(ca_pem)?.with_no_client_auth())
}

/// The name to demand of the controller, at whatever address it is.
pub fn controller_server_name() -> ServerName<'static> {
    // A constant, checked by a test.
    #[allow(clippy::expect_used)]
    ServerName::try_from(CONTROLLER_NAME).expect("a constant DNS name")
}

/// The name to demand of a host's agent, at whatever address it is.
pub fn host_server_name(host: &HostName) -> ServerName<'static> {
    // A host name is a DNS label of at most 40 characters, so the whole is a DNS name.
    #[allow(clippy::expect_used)]
    ServerName::try_from(host_dns_name(host)).expect("a host name is a DNS label")
}

/// Whom the first certificate of a verified chain names.
pub fn peer_name(certificates: &[CertificateDer<'_>]) -> Result<PeerName, TlsError> {
    let Some(first) = certificates.first() else { return Err(TlsError::PeerName { names: Vec::new() }) };
    let certificate = webpki::EndEntityCert::try_from(first).map_err(|source| TlsError::Peer { source })?;
    let names: Vec<&str> = certificate.valid_dns_names().collect();
    let peer = match names.as_slice() {
        [CONTROLLER_NAME] => Some(PeerName::Controller),
        [ADMIN_NAME] => Some(PeerName::Admin),
        [name] => name.strip_suffix(HOST_SUFFIX).and_then(|host| HostName::new(host).ok()).map(PeerName::Host),
        _ => None,
    };
    peer.ok_or_else(|| TlsError::PeerName { names: names.into_iter().map(str::to_owned).collect() })
}

/// SHA-256 of a certificate (DER), as hexadecimal digits.
pub fn certificate_sha256(certificate: &CertificateDer<'_>) -> String {
    Sha256::digest(certificate.as_ref()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A new key and a request to certify it for this host: (key PEM, PKCS#10 PEM).
pub fn make_csr(host: &HostName) -> Result<(String, String), TlsError> {
    let key = generate_key()?;
    let sign = |source| TlsError::Sign { source };
    let mut params = CertificateParams::new(vec![host_dns_name(host)]).map_err(sign)?;
    params.distinguished_name.push(DnType::CommonName, host.as_str());
    let request = params.serialize_request(&key).map_err(sign)?;
    Ok((key.serialize_pem(), request.pem().map_err(sign)?))
}

/// Writes a file of mode 0600, whole or not at all.
pub fn write_private(path: &Path, text: &str) -> Result<(), TlsError> {
    let failed = |source| TlsError::File { doing: "written", path: path.to_owned(), source };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    fs::rename(&temporary, path).map_err(failed)
}

fn host_dns_name(host: &HostName) -> String {
    format!("{host}{HOST_SUFFIX}")
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn client_builder(
    ca_pem: &str,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, TlsError> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| TlsError::Config { source })?
        .with_root_certificates(roots(ca_pem)?))
}

fn roots(ca_pem: &str) -> Result<RootCertStore, TlsError> {
    let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes())
        .map_err(|source| TlsError::Pem { what: "the authority's certificate", source })?;
    let mut roots = RootCertStore::empty();
    roots.add(ca).map_err(|source| TlsError::Config { source })?;
    Ok(roots)
}

fn generate_key() -> Result<KeyPair, TlsError> {
    KeyPair::generate().map_err(|source| TlsError::Generate { source })
}

fn make_directory(dir: &Path) -> Result<(), TlsError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| TlsError::File {
        doing: "created",
        path: dir.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<String, TlsError> {
    fs::read_to_string(path).map_err(|source| TlsError::File { doing: "read", path: path.to_owned(), source })
}

fn read_if_there(path: &Path) -> Result<Option<String>, TlsError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TlsError::File { doing: "read", path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn der(pem: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
    }

    #[test]
    fn an_authority_survives_reopening_and_names_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let ca = Authority::open(dir.path()).unwrap().ca_pem().to_owned();
        let again = Authority::open(dir.path()).unwrap();
        assert_eq!(again.ca_pem(), ca);
        let mode = fs::metadata(dir.path().join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let host = HostName::new("h1").unwrap();
        let (key_pem, csr_pem) = make_csr(&host).unwrap();
        // What the request asks for does not matter: the name is the authority's choice.
        let other = HostName::new("h2").unwrap();
        let certificate_pem = again.sign_csr(&csr_pem, &other).unwrap();
        assert_eq!(peer_name(&[der(&certificate_pem)]).unwrap(), PeerName::Host(other));
        let identity = Identity { certificate_pem, key_pem, ca_pem: ca };
        identity.save(&dir.path().join("id")).unwrap();
        assert_eq!(Identity::load(&dir.path().join("id")).unwrap(), Some(identity.clone()));
        assert_eq!(Identity::load(&dir.path().join("none")).unwrap(), None);
        server_config(&identity, ClientCertificate::Required).unwrap();
        client_config(&identity).unwrap();
        assert_eq!(identity.certificate_sha256().unwrap().len(), 64);
        assert_eq!(peer_name(&[der(&again.admin_identity().unwrap().certificate_pem)]).unwrap(), PeerName::Admin);
    }

    #[test]
    fn foreign_or_broken_certificates_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(dir.path()).unwrap();
        assert!(matches!(authority.sign_csr("nonsense", &HostName::new("a").unwrap()), Err(TlsError::Request { .. })));
        assert!(matches!(
            peer_name(&[der(authority.ca_pem())]),
            Err(TlsError::PeerName { .. } | TlsError::Peer { .. })
        ));
        assert!(matches!(peer_name(&[]), Err(TlsError::PeerName { .. })));
        let _ = (controller_server_name(), host_server_name(&HostName::new("a".repeat(40)).unwrap()));
    }
}
