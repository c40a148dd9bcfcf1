//! The client over mutual TLS.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use godwit_api::client::{Address, Client, ClientError};
use godwit_api::tls::{Authority, ClientCertificate, client_config, server_config};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio_rustls::TlsAcceptor;

/// A controller's listener that insists on a certificate.
async fn serve(authority: &Authority) -> SocketAddr {
    let config = server_config(&authority.controller_identity().unwrap(), ClientCertificate::Required).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let version = || async { axum::Json(serde_json::json!({"version": "0.1.0", "store_id": "s"})) };
    let router = Router::new().route("/v1/version", get(version));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, service) = (acceptor.clone(), TowerToHyperService::new(router.clone()));
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let _ =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    address
}

fn client(address: SocketAddr, authority: &Authority) -> Client {
    let config = client_config(&authority.admin_identity().unwrap()).unwrap();
    let address = Address::Https { host: address.ip().to_string(), port: address.port() };
    Client::new(address).with_tls(Arc::new(config))
}

fn authority(directory: &Path) -> Authority {
    Authority::open(directory).unwrap()
}

#[tokio::test]
async fn certificates_of_one_installation_meet_and_others_do_not() {
    let directory = tempfile::tempdir().unwrap();
    let ours = authority(&directory.path().join("ours"));
    let theirs = authority(&directory.path().join("theirs"));
    let address = serve(&ours).await;
    assert_eq!(client(address, &ours).version().await.unwrap().store_id, "s");

    let error = client(address, &theirs).version().await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
}
