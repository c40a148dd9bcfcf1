//! What would happen, and why something is where it is. Nothing in here changes anything.

use godwit_api::types::PlacementView;
use godwit_model::{ContainerName, HostName};
use godwit_plan::{Advice, FleetError, RecoveryPlan};
use thiserror::Error;

use crate::balance;
use crate::core::Core;
use crate::hosts::{HostError, host};
use crate::reconcile::held::Spared;
use crate::reconcile::view;

/// Why a container's place cannot be explained.
#[derive(Debug, Error)]
pub enum ExplainError {
    #[error("there is no container {name}")]
    NoSuchContainer { name: ContainerName },
    #[error("the hosts cannot be judged")]
    Fleet(#[from] FleetError),
}

/// Every host as a place for a container.
pub fn placement(core: &Core, name: &ContainerName) -> Result<PlacementView, ExplainError> {
    let world = core.state.world();
    let record = world.containers.get(name).filter(|c| !c.removed);
    let record = record.ok_or_else(|| ExplainError::NoSuchContainer { name: name.clone() })?;
    let fleet = view::fleet(core, &world);
    let mover = fleet.mover(name, &[])?;
    let here = mover.here();
    let hosts = match here {
        Some(_) => mover.explain(),
        None => fleet.explain(&view::member(core, &world, record, None)),
    };
    Ok(PlacementView { hosts, here })
}

/// What would start where if the host were lost now.
pub fn fail(core: &Core, name: &HostName) -> Result<RecoveryPlan, HostError> {
    let world = core.state.world();
    host(&world, name)?;
    Ok(godwit_plan::recover(&view::fleet_but(core, &world, Spared::of_evacuation(name)), name)?)
}

/// Moves that would make the fleet better by the policy of balancing, whatever keeps it from making them now.
pub fn rebalance(core: &Core) -> Advice {
    balance::preview(core, &core.state.world())
}
