//! The people's routes that answer once.

use axum::Json;
use axum::extract::State;
use godwit_api::types::{
    ActivateRequest, ApplyAnswer, ApplyRequest, BalanceAnswer, BalanceChange, BalanceView, ContainerView,
    EnvironmentView, EvacuateAnswer, EvacuateRequest, HostView, MigrateRequest, MovePlan, PlacementView, VersionView,
};
use godwit_model::migration::Move;
use godwit_model::{ContainerName, EnvName, HostName};
use godwit_plan::{Advice, RecoveryPlan};
use serde::Deserialize;

use super::Api;
use super::error::ApiError;
use super::extract::{Body, ContainerPath, EnvPath, HostPath, MovePath, Params};
use super::views::{REMOVING, Sight};
use crate::apply::{self, ApplyError};
use crate::{balance, containers, hosts, moves, plans};

type Answer<T> = Result<Json<T>, ApiError>;

pub async fn version(State(api): State<Api>) -> Json<VersionView> {
    let store_id = api.core.state.world().store_id.clone();
    Json(VersionView { version: env!("CARGO_PKG_VERSION").to_owned(), store_id })
}

pub async fn list_hosts(State(api): State<Api>) -> Json<Vec<HostView>> {
    Json(Sight::of(&api.core).hosts())
}

pub async fn evacuate(
    State(api): State<Api>,
    HostPath(host): HostPath,
    Body(EvacuateRequest { options, dry_run }): Body<EvacuateRequest>,
) -> Answer<EvacuateAnswer> {
    let (plan, since) = hosts::evacuate(&api.core, &host, &options, dry_run).await?;
    Ok(Json(EvacuateAnswer { plan, since }))
}

pub async fn cordon(State(api): State<Api>, HostPath(host): HostPath) -> Answer<HostView> {
    hosts::cordon(&api.core, &host).await?;
    host_view(&api, &host)
}

pub async fn activate(
    State(api): State<Api>,
    HostPath(host): HostPath,
    Body(ActivateRequest { bring_back }): Body<ActivateRequest>,
) -> Answer<HostView> {
    hosts::activate(&api.core, &host, bring_back).await?;
    host_view(&api, &host)
}

pub async fn declare_dead(State(api): State<Api>, HostPath(host): HostPath) -> Answer<HostView> {
    hosts::declare_dead(&api.core, &host).await?;
    host_view(&api, &host)
}

fn host_view(api: &Api, name: &HostName) -> Answer<HostView> {
    let found = Sight::of(&api.core).hosts().into_iter().find(|host| host.name == *name);
    found.map(Json).ok_or_else(|| ApiError::no_host(name))
}

pub async fn balance(State(api): State<Api>) -> Json<BalanceView> {
    Json(balance::view(&api.core, &api.core.state.world()))
}

pub async fn change_balance(State(api): State<Api>, Body(change): Body<BalanceChange>) -> Answer<BalanceView> {
    balance::change(&api.core, &change).await?;
    Ok(Json(balance::view(&api.core, &api.core.state.world())))
}

pub async fn balance_now(State(api): State<Api>) -> Answer<BalanceAnswer> {
    let (advice, since) = balance::now(&api.core).await?;
    Ok(Json(BalanceAnswer { advice, since }))
}

pub async fn environments(State(api): State<Api>) -> Json<Vec<EnvironmentView>> {
    Json(Sight::of(&api.core).environments())
}

pub async fn environment(State(api): State<Api>, EnvPath(name): EnvPath) -> Answer<EnvironmentView> {
    let sight = Sight::of(&api.core);
    let env = sight.world.envs.get(&name).ok_or_else(|| ApiError::no_environment(&name))?;
    Ok(Json(sight.environment(env)))
}

pub async fn apply(
    State(api): State<Api>,
    EnvPath(path): EnvPath,
    Body(ApplyRequest { manifest, dry_run }): Body<ApplyRequest>,
) -> Answer<ApplyAnswer> {
    if path != manifest.name {
        return Err(ApplyError::OtherName { path, manifest: manifest.name }.into());
    }
    Ok(Json(apply::apply(&api.core, &manifest, dry_run).await?))
}

pub async fn delete_environment(State(api): State<Api>, EnvPath(name): EnvPath) -> Answer<ApplyAnswer> {
    Ok(Json(apply::delete(&api.core.state, &name).await?))
}

#[derive(Deserialize)]
pub struct ContainersParams {
    env: Option<EnvName>,
}

pub async fn containers(
    State(api): State<Api>,
    Params(ContainersParams { env }): Params<ContainersParams>,
) -> Answer<Vec<ContainerView>> {
    let sight = Sight::of(&api.core);
    if let Some(env) = env.as_ref().filter(|env| !sight.world.envs.contains_key(env)) {
        return Err(ApiError::no_environment(env));
    }
    Ok(Json(sight.containers(env.as_ref())))
}

pub async fn container(State(api): State<Api>, ContainerPath(name): ContainerPath) -> Answer<ContainerView> {
    view(&api, &name).map(Json)
}

pub async fn remove_container(State(api): State<Api>, ContainerPath(name): ContainerPath) -> Answer<ContainerView> {
    let before = view(&api, &name)?;
    containers::remove(&api.core.state, &name).await?;
    // One that no host holds is gone already.
    let gone = || ContainerView { state: REMOVING.to_owned(), message: None, host: None, ..before };
    Ok(Json(view(&api, &name).unwrap_or_else(|_| gone())))
}

pub async fn stop(State(api): State<Api>, ContainerPath(name): ContainerPath) -> Answer<ContainerView> {
    containers::set_run(&api.core.state, &name, false).await?;
    view(&api, &name).map(Json)
}

pub async fn start(State(api): State<Api>, ContainerPath(name): ContainerPath) -> Answer<ContainerView> {
    containers::set_run(&api.core.state, &name, true).await?;
    view(&api, &name).map(Json)
}

pub async fn migrate(
    State(api): State<Api>,
    ContainerPath(name): ContainerPath,
    Body(MigrateRequest { to, options }): Body<MigrateRequest>,
) -> Answer<Move> {
    Ok(Json(moves::request(&api.core, &name, to, options).await?))
}

pub async fn plan_move(
    State(api): State<Api>,
    ContainerPath(name): ContainerPath,
    Body(MigrateRequest { to, options }): Body<MigrateRequest>,
) -> Answer<MovePlan> {
    Ok(Json(moves::would(&api.core, &name, to.as_ref(), &options).await?))
}

pub async fn placement(State(api): State<Api>, ContainerPath(name): ContainerPath) -> Answer<PlacementView> {
    Ok(Json(plans::placement(&api.core, &name)?))
}

pub async fn plan_fail(State(api): State<Api>, HostPath(host): HostPath) -> Answer<RecoveryPlan> {
    Ok(Json(plans::fail(&api.core, &host)?))
}

pub async fn plan_rebalance(State(api): State<Api>) -> Json<Advice> {
    Json(plans::rebalance(&api.core))
}

pub async fn moves(State(api): State<Api>) -> Json<Vec<Move>> {
    let world = api.core.state.world();
    let mut moves: Vec<Move> = world.moves.keys().filter_map(|id| api.core.moves.view(&world, id)).collect();
    moves.sort_by(|a, b| (a.requested_at_ms, &a.id).cmp(&(b.requested_at_ms, &b.id)));
    Json(moves)
}

pub async fn one_move(State(api): State<Api>, MovePath(id): MovePath) -> Answer<Move> {
    let found = api.core.moves.view(&api.core.state.world(), &id);
    found.map(Json).ok_or_else(|| ApiError::no_move(&id))
}

pub async fn cancel_move(State(api): State<Api>, MovePath(id): MovePath) -> Answer<Move> {
    Ok(Json(moves::cancel(&api.core, &id).await?))
}

fn view(api: &Api, name: &ContainerName) -> Result<ContainerView, ApiError> {
    let sight = Sight::of(&api.core);
    let container = sight.world.containers.get(name).ok_or_else(|| ApiError::no_container(name))?;
    Ok(sight.container(container))
}
