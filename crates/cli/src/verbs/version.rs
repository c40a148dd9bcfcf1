//! `godwit version`.

use anyhow::Result;
use godwit_api::types::VersionView;
use serde::Serialize;

use super::DONE;
use crate::args::Global;
use crate::connect;
use crate::printer::Printer;
use crate::table;

#[derive(Serialize)]
struct Versions {
    client: &'static str,
    /// `None` where no controller answers.
    controller: Option<VersionView>,
}

pub async fn run(global: &Global, printer: &Printer) -> Result<u8> {
    // The own version is told also where no controller runs; which that is, `-v` tells.
    let controller = match connect::client(global) {
        Ok(client) => client.version().await.map_err(anyhow::Error::from),
        Err(error) => Err(error),
    };
    if let Err(error) = &controller {
        tracing::debug!("no controller's version: {error:#}");
    }
    let versions = Versions { client: env!("CARGO_PKG_VERSION"), controller: controller.ok() };
    printer.value(&versions, |v| {
        let controller = match &v.controller {
            Some(c) => format!("{} (store {})", c.version, c.store_id),
            None => "not running".to_owned(),
        };
        table::pairs(printer, [("godwit", v.client.to_owned()), ("controller", controller)])
    })?;
    Ok(DONE)
}
