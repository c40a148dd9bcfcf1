//! From what a person types to the container that is meant.

use anyhow::Result;
use godwit_api::client::Client;
use godwit_model::{ContainerName, EnvName, LayerName, NameError};

use crate::failure::Failure;

/// Most names that an error lists.
const MAX_LISTED: usize = 12;

/// `shop/db-1`, or `shop/db` where the layer has exactly one container.
pub async fn container(client: &Client, text: &str) -> Result<ContainerName> {
    let not = || NameError::NotAContainer { text: text.to_owned() };
    if let Ok(name) = text.parse() {
        return Ok(name);
    }
    let (env, layer) = text.split_once('/').ok_or_else(not)?;
    let (env, layer) = (EnvName::new(env)?, LayerName::new(layer)?);
    let all = client.containers(Some(&env)).await?;
    let mut names: Vec<ContainerName> = all.into_iter().map(|c| c.name).collect();
    names.sort();
    let of_layer: Vec<&ContainerName> = names.iter().filter(|name| name.layer == layer).collect();
    match of_layer.as_slice() {
        [only] => Ok((*only).clone()),
        [] if names.is_empty() => Err(Failure::new(format!("{env} has no containers"))
            .hint("`godwit env list` shows all environments")
            .into()),
        [] => Err(Failure::new(format!("{env} has no container of a layer {layer:?}", layer = layer.as_str()))
            .hint(format!("it has {}", list(names.iter())))
            .into()),
        several => Err(Failure::new(format!("layer {text} has {} containers: say which one", several.len()))
            .hint(format!("it has {}", list(several.iter().copied())))
            .into()),
    }
}

fn list<'a>(names: impl ExactSizeIterator<Item = &'a ContainerName>) -> String {
    let left_out = names.len().saturating_sub(MAX_LISTED);
    let shown: Vec<String> = names.take(MAX_LISTED).map(ToString::to_string).collect();
    match left_out {
        0 => shown.join(", "),
        n => format!("{} and {n} more", shown.join(", ")),
    }
}
