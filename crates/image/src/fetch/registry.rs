//! A repository of a registry (OCI distribution-spec 1.1, "Pull"): every answer is bounded, blobs go
//! on where a broken connection ended.

use super::challenge::{self, Challenge};
use super::{FetchError, verify};
use crate::digest::Digest;
use crate::limits::MAX_MANIFEST_BYTES;
use crate::manifest::ACCEPTED;
use crate::source::{RegistryAuth, RegistryTls};
use bytes::Bytes;
use oci_spec::distribution::Reference;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_RANGE, HeaderValue, RANGE, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, Url};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, mpsc};

/// Pieces of a blob between the network and the thread that unpacks; hyper's are up to 16 KiB or so.
pub(super) const CHANNEL_CHUNKS: usize = 64;
const CONNECT_TIMEOUT_SECONDS: u64 = 10;
/// Longest silence within an answer.
const READ_TIMEOUT_SECONDS: u64 = 30;
/// Longest time for a whole manifest, configuration or token.
const DOCUMENT_TIMEOUT_SECONDS: u64 = 60;
const MAX_TOKEN_BYTES: u64 = 1 << 20;
const MAX_ERROR_BYTES: u64 = 8 << 10;
/// Tries for one blob, the first included.
const MAX_BLOB_TRIES: u32 = 5;
/// Pause before the second try; doubled each time.
const FIRST_PAUSE_MS: u64 = 200;

pub(crate) struct Registry {
    http: Client,
    /// `host[:port]`, for messages.
    name: String,
    /// `scheme://host[:port]/v2/repository`.
    base: String,
    repository: String,
    /// The tag, or the digest if the reference has one.
    wanted: String,
    digest: Option<Digest>,
    auth: RegistryAuth,
    plain: bool,
    authorization: Mutex<Option<HeaderValue>>,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Registry {
    pub fn new(reference: &Reference, auth: &RegistryAuth, tls: &RegistryTls) -> Result<Registry, FetchError> {
        // Another part of the process may have installed one; only its absence matters.
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let name = reference.resolve_registry().to_owned();
        let mut builder = Client::builder()
            .user_agent(concat!("godwit/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(CONNECT_TIMEOUT_SECONDS))
            .read_timeout(Duration::from_secs(READ_TIMEOUT_SECONDS));
        let plain = matches!(tls, RegistryTls::Insecure);
        if let RegistryTls::Verify { extra_ca_pem: Some(pem) } = tls {
            builder = builder.tls_certs_merge(reqwest::Certificate::from_pem_bundle(pem).map_err(FetchError::Ca)?);
        }
        let http = builder.build().map_err(|source| FetchError::Setup { registry: name.clone(), source })?;
        let digest = reference.digest().and_then(|digest| digest.parse().ok());
        let wanted = reference.digest().or(reference.tag()).unwrap_or("latest").to_owned();
        let scheme = if plain { "http" } else { "https" };
        let repository = reference.repository().to_owned();
        let base = format!("{scheme}://{name}/v2/{repository}");
        let (auth, authorization) = (auth.clone(), Mutex::default());
        Ok(Registry { http, name, base, repository, wanted, digest, auth, plain, authorization })
    }

    /// What the reference leads to: a manifest or an index.
    pub async fn start(&self) -> Result<Vec<u8>, FetchError> {
        let what = format!("manifests/{}", self.wanted);
        let bytes = self.document(&what, MAX_MANIFEST_BYTES).await?;
        if let Some(expected) = self.digest {
            verify(&bytes, expected, what)?;
        }
        Ok(bytes)
    }

    /// `what`: the path after the repository's name. Not verified.
    pub async fn document(&self, what: &str, max: u64) -> Result<Vec<u8>, FetchError> {
        self.in_time(async { self.body(self.get(what, 0).await?, what, max).await }).await
    }

    /// Sends the blob's bytes into `sender`; ends when all are sent, an error was, or nobody listens.
    pub async fn feed(self: Arc<Self>, digest: Digest, size: u64, sender: mpsc::Sender<Result<Bytes, FetchError>>) {
        let what = format!("blobs/{digest}");
        let mut sent = 0;
        for attempt in 1..=MAX_BLOB_TRIES {
            let error = match self.feed_from(&what, &mut sent, &sender).await {
                Ok(()) => return,
                Err(error) => error,
            };
            let worth_it = match &error {
                FetchError::Transport { .. } => true,
                FetchError::Status { status, .. } => *status >= 500 || *status == 429,
                _ => false,
            };
            if !worth_it || attempt == MAX_BLOB_TRIES || sent >= size {
                // Nobody listening is fine.
                let _ = sender.send(Err(error)).await;
                return;
            }
            tracing::debug!(registry = %self.name, %what, sent, attempt, %error, "blob broke off, trying again");
            tokio::time::sleep(Duration::from_millis(FIRST_PAUSE_MS << (attempt - 1))).await;
        }
    }

    async fn feed_from(
        &self,
        what: &str,
        sent: &mut u64,
        sender: &mpsc::Sender<Result<Bytes, FetchError>>,
    ) -> Result<(), FetchError> {
        let mut response = self.get(what, *sent).await?;
        // A registry may answer a range with all of it.
        let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        if partial && !range.is_some_and(|range| range.starts_with(&format!("bytes {}-", *sent))) {
            let body = format!("wrong range {range:?}");
            return Err(FetchError::Status { registry: self.name.clone(), what: what.into(), status: 206, body });
        }
        let mut repeated = if partial { 0 } else { *sent };
        while let Some(mut chunk) = response.chunk().await.map_err(|source| self.transport(source))? {
            let known = repeated.min(chunk.len() as u64);
            repeated -= known;
            let fresh = chunk.split_off(known as usize);
            *sent += fresh.len() as u64;
            if !fresh.is_empty() && sender.send(Ok(fresh)).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// A successful answer to a GET from byte `from` on, authenticated as the registry wants it.
    async fn get(&self, what: &str, from: u64) -> Result<Response, FetchError> {
        let mut challenged = false;
        loop {
            let authorization = self.authorization.lock().await.clone();
            let mut request = self.http.get(format!("{}/{what}", self.base)).header(ACCEPT, ACCEPTED);
            if let Some(value) = &authorization {
                request = request.header(AUTHORIZATION, value);
            }
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let response = request.send().await.map_err(|source| self.transport(source))?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            if status == StatusCode::UNAUTHORIZED && !challenged {
                challenged = true;
                let fresh = self.authenticate(&response).await?;
                *self.authorization.lock().await = Some(fresh);
                continue;
            }
            return Err(self.refusal(response, what).await);
        }
    }

    /// The `Authorization` header that the registry's challenge asks for.
    async fn authenticate(&self, response: &Response) -> Result<HeaderValue, FetchError> {
        let offered: Vec<&str> =
            response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()).collect();
        let challenges: Vec<Challenge> = offered.iter().filter_map(|header| challenge::parse(header)).collect();
        let unsupported = || FetchError::Challenge {
            registry: self.name.clone(),
            challenge: offered.join("; ").chars().take(200).collect(),
        };
        let bearer = challenges.iter().find_map(|challenge| match challenge {
            Challenge::Bearer { realm, service, scope } => Some((realm, service, scope)),
            Challenge::Basic => None,
        });
        if let Some((realm, service, scope)) = bearer {
            let mut url = Url::parse(realm).map_err(|_| unsupported())?;
            // A password must not leave over plain HTTP because the registry says so.
            if url.scheme() != "https" && !self.plain {
                return Err(unsupported());
            }
            let default_scope = format!("repository:{}:pull", self.repository);
            url.query_pairs_mut().append_pair("scope", scope.as_ref().unwrap_or(&default_scope));
            if let Some(service) = service {
                url.query_pairs_mut().append_pair("service", service);
            }
            return self.in_time(self.token(url)).await;
        }
        match (challenges.contains(&Challenge::Basic), &self.auth) {
            (true, RegistryAuth::Basic { user, password }) => {
                let request = self
                    .http
                    .get(&self.base)
                    .basic_auth(user, Some(password))
                    .build()
                    .map_err(|source| self.transport(source))?;
                request.headers().get(AUTHORIZATION).cloned().ok_or_else(unsupported)
            }
            (true, RegistryAuth::Anonymous) => Err(FetchError::LoginNeeded { registry: self.name.clone() }),
            (false, _) => Err(unsupported()),
        }
    }

    async fn token(&self, url: Url) -> Result<HeaderValue, FetchError> {
        let mut request = self.http.get(url);
        if let RegistryAuth::Basic { user, password } = &self.auth {
            request = request.basic_auth(user, Some(password));
        }
        let response = request.send().await.map_err(|source| self.transport(source))?;
        if !response.status().is_success() {
            return Err(self.refusal(response, "the token").await);
        }
        let body = self.body(response, "the token", MAX_TOKEN_BYTES).await?;
        let token = serde_json::from_slice::<Token>(&body).ok().and_then(|token| token.token.or(token.access_token));
        let mut value =
            token.and_then(|token| HeaderValue::try_from(format!("Bearer {token}")).ok()).ok_or_else(|| {
                FetchError::Challenge {
                    registry: self.name.clone(),
                    challenge: "its token server gave no token".into(),
                }
            })?;
        value.set_sensitive(true);
        Ok(value)
    }

    async fn refusal(&self, response: Response, what: &str) -> FetchError {
        let (registry, what) = (self.name.clone(), what.to_owned());
        match (response.status(), &self.auth) {
            (StatusCode::UNAUTHORIZED, RegistryAuth::Basic { user, .. }) => {
                FetchError::WrongPassword { registry, user: user.clone() }
            }
            (StatusCode::UNAUTHORIZED, RegistryAuth::Anonymous) => FetchError::LoginNeeded { registry },
            (StatusCode::FORBIDDEN, _) => FetchError::Denied { registry, what: self.repository.clone() },
            (StatusCode::NOT_FOUND, _) => {
                FetchError::NotFound { registry, what: format!("{}/{what}", self.repository) }
            }
            (status, _) => {
                let body = self.body(response, "the error", MAX_ERROR_BYTES).await.unwrap_or_default();
                let body = String::from_utf8_lossy(&body).chars().filter(|c| !c.is_control()).take(300).collect();
                FetchError::Status { registry, what, status: status.as_u16(), body }
            }
        }
    }

    async fn body(&self, mut response: Response, what: &str, max: u64) -> Result<Vec<u8>, FetchError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|source| self.transport(source))? {
            if bytes.len() as u64 + chunk.len() as u64 > max {
                return Err(FetchError::TooLong { what: what.into(), max });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    async fn in_time<T>(&self, work: impl Future<Output = Result<T, FetchError>>) -> Result<T, FetchError> {
        let limit = Duration::from_secs(DOCUMENT_TIMEOUT_SECONDS);
        let late = |_| FetchError::Timeout { registry: self.name.clone(), seconds: DOCUMENT_TIMEOUT_SECONDS };
        tokio::time::timeout(limit, work).await.map_err(late)?
    }

    fn transport(&self, source: reqwest::Error) -> FetchError {
        FetchError::Transport { registry: self.name.clone(), source }
    }
}
