//! Validated cluster state: Services, endpoints, node facts, indexed by what a change concerns.
//!
//! Sources send [`Batch`]es; [`Intake`] settles ownership and completeness and returns [`Edit`]s;
//! [`Model`] applies them and says which Services to compile again.
//!
//! Imports neither aya nor kube (`cargo xtask lint` checks).

#[cfg(test)]
pub(crate) mod build;
mod change;
mod intake;
mod labels;
mod object;
mod store;

#[cfg(test)]
mod tests;

pub use change::{Batch, Change, Edit, Kind, Object, ObjectKey, SourceId};
pub use intake::Intake;
pub use labels::Labels;
pub use object::{
    Algorithm, Annotated, Conditions, ContainerPort, Endpoint, EndpointAddress, EndpointPort,
    EndpointSlice, EndpointSubset, Endpoints, Hints, IpFamilyPolicy, IpMode, LoadBalancerIngress,
    Node, NodeFacts, ObjectName, Pod, Service, ServicePort, ServiceType, TargetPort, TrafficPolicy,
    family_name, family_of, protocol_name,
};
pub use store::Model;
