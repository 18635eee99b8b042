//! The gRPC health checking protocol (`grpc.health.v1.Health/Check`), whose two messages are written out here.

use std::time::Duration;

use http::uri::PathAndQuery;
use tonic::client::Grpc;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;

use super::ProbeError;

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    /// 1 is SERVING.
    #[prost(int32, tag = "1")]
    status: i32,
}

const SERVING: i32 = 1;

pub(super) async fn check(host: &str, port: u16, service: &str) -> Result<(), ProbeError> {
    let bracketed = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let address = format!("{bracketed}:{port}");
    let failed = |source| ProbeError::Grpc { address: address.clone(), source };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(failed)?;
    let channel = endpoint.connect_timeout(Duration::from_secs(10)).connect().await.map_err(failed)?;
    let mut client = Grpc::new(channel);
    client.ready().await.map_err(failed)?;
    let request = tonic::Request::new(HealthCheckRequest { service: service.to_owned() });
    let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let codec = ProstCodec::<HealthCheckRequest, HealthCheckResponse>::default();
    match client.unary(request, path, codec).await {
        Ok(answer) if answer.get_ref().status == SERVING => Ok(()),
        Ok(answer) => {
            let status = answer.get_ref().status;
            Err(ProbeError::Failed(format!("service unhealthy (responded with {status:?})")))
        }
        Err(status) => {
            Err(ProbeError::Failed(format!("error: rpc error: code = {:?} desc = {}", status.code(), status.message())))
        }
    }
}
