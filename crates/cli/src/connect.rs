//! Which controller is meant.

use std::env;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use godwit_api::client::{Address, Client};
use godwit_api::tls::{Identity, client_config};
use godwit_lab::{LabName, LabPaths};

use crate::args::Global;
use crate::failure::Failure;
use crate::human;

/// Where a controller listens on a server where nothing else is said.
pub const SYSTEM_SOCKET: &str = "/run/godwit/api.sock";

/// The client of the controller that flags, environment variables, or what runs here name, in this order.
pub fn client(global: &Global) -> Result<Client> {
    let address = address(global)?;
    let over_tls = matches!(address, Address::Https { .. });
    let client = Client::new(address);
    let directory = global.identity.clone().or_else(|| env::var_os("GODWIT_IDENTITY").map(PathBuf::from));
    match directory {
        Some(directory) if over_tls => {
            let identity = Identity::load(&directory)?.ok_or_else(|| {
                Failure::new(format!("there is no identity.crt in {}", directory.display()))
                    .hint("the controller keeps an identity for people in its state directory")
            })?;
            Ok(client.with_tls(Arc::new(client_config(&identity)?)))
        }
        // Without one the client says that it is missing.
        _ => Ok(client),
    }
}

fn address(global: &Global) -> Result<Address> {
    if let Some(address) = &global.controller {
        return Ok(address.parse()?);
    }
    if let Some(lab) = &global.lab {
        return of_lab(lab);
    }
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    if let Some(address) = variable("GODWIT_CONTROLLER") {
        return address.parse().context("the variable GODWIT_CONTROLLER is wrong");
    }
    if let Some(lab) = variable("GODWIT_LAB") {
        return of_lab(&lab).context("the variable GODWIT_LAB is wrong");
    }
    if Path::new(SYSTEM_SOCKET).exists() {
        return Ok(Address::Unix(SYSTEM_SOCKET.into()));
    }
    let running: Vec<LabName> = godwit_lab::list().into_iter().filter(|lab| accepts(&socket(lab))).collect();
    match running.as_slice() {
        [] => Ok(Address::Unix(SYSTEM_SOCKET.into())),
        [lab] => Ok(Address::Unix(socket(lab))),
        several => {
            let names: Vec<&str> = several.iter().map(LabName::as_str).collect();
            Err(Failure::new(format!("{} run here: {}", human::count(names.len(), "lab"), names.join(", ")))
                .hint("choose one with `--lab NAME` or the variable GODWIT_LAB")
                .into())
        }
    }
}

fn of_lab(name: &str) -> Result<Address> {
    let name = LabName::new(name)?;
    let path = socket(&name);
    if path.exists() {
        return Ok(Address::Unix(path));
    }
    let names: Vec<String> = godwit_lab::list().iter().map(ToString::to_string).collect();
    let hint = match names.len() {
        _ if names.contains(&name.to_string()) => format!("`godwit lab start ctl --name {name}` starts it"),
        0 => "no lab is up on this machine; `godwit lab up --hosts 3` makes one".to_owned(),
        _ => format!("there are: {}", names.join(", ")),
    };
    Err(Failure::new(format!("no controller runs in a lab {name}")).hint(hint).into())
}

fn socket(lab: &LabName) -> PathBuf {
    LabPaths::new(lab.clone()).api_socket()
}

fn accepts(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}
