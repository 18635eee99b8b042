//! The messages of `pluginregistration.Registration`, which the plugin serves.

use std::time::Duration;

use tonic::transport::Channel;

use crate::grpc::{self, CallError};

pub(super) const GET_INFO: &str = "/pluginregistration.Registration/GetInfo";
pub(super) const NOTIFY: &str = "/pluginregistration.Registration/NotifyRegistrationStatus";

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct InfoRequest {}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PluginInfo {
    #[prost(string, tag = "1")]
    pub r#type: String,
    #[prost(string, tag = "2")]
    pub name: String,
    /// Empty when it is the socket that was asked.
    #[prost(string, tag = "3")]
    pub endpoint: String,
    #[prost(string, repeated, tag = "4")]
    pub supported_versions: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RegistrationStatus {
    #[prost(bool, tag = "1")]
    pub plugin_registered: bool,
    #[prost(string, tag = "2")]
    pub error: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RegistrationStatusResponse {}

pub(super) async fn get_info(channel: &Channel, within: Duration) -> Result<PluginInfo, CallError> {
    grpc::call(channel, GET_INFO, InfoRequest {}, within).await
}

/// Tells the plugin that it is registered, or why it is not.
pub(super) async fn tell(channel: &Channel, refusal: Option<String>, within: Duration) -> Result<(), CallError> {
    let status = RegistrationStatus { plugin_registered: refusal.is_none(), error: refusal.unwrap_or_default() };
    grpc::call::<_, RegistrationStatusResponse>(channel, NOTIFY, status, within).await.map(drop)
}
