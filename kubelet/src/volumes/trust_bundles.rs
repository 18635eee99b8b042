//! The content of `clusterTrustBundle` projections: the certificates of one bundle, or of all bundles of a signer that
//! a selector picks, each certificate once and in an order that does not change from look to look.

use std::collections::BTreeSet;

use k8s_openapi::api::certificates::v1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::ClusterTrustBundleProjection;
use kube::Api;
use kube::api::ListParams;
use kube::core::Selector;

use super::pem;
use crate::objects::{ObjectError, Objects};

#[derive(Debug, thiserror::Error)]
pub enum TrustBundleError {
    #[error(transparent)]
    Get(#[from] ObjectError),
    #[error("cannot list the ClusterTrustBundles of signer {signer:?}")]
    List { signer: String, source: Box<kube::Error> },
    #[error("combination of signerName and labelSelector matched zero ClusterTrustBundles")]
    NoMatch,
    #[error("while parsing label selector")]
    Selector(#[source] kube::core::ParseExpressionError),
    #[error("the ClusterTrustBundle {name:?} holds a certificate that is not one: {source:?}")]
    Certificate { name: String, source: rustls::pki_types::pem::Error },
    #[error("ClusterTrustBundle projection requires either name or signerName to be set")]
    NoSource,
}

/// The text of the projected file.
pub async fn content(objects: &Objects, source: &ClusterTrustBundleProjection) -> Result<String, TrustBundleError> {
    let optional = source.optional.unwrap_or(false);
    let bundles = match (&source.name, &source.signer_name) {
        (Some(name), _) => match objects.trust_bundle(name).await {
            Ok(bundle) => vec![bundle],
            Err(error) if optional && error.is_not_found() => Vec::new(),
            Err(error) => return Err(error.into()),
        },
        (None, Some(signer)) => {
            let found = of_signer(objects, signer, source).await?;
            if found.is_empty() && !optional {
                return Err(TrustBundleError::NoMatch);
            }
            found
        }
        (None, None) => return Err(TrustBundleError::NoSource),
    };
    anchors(&bundles)
}

/// Without a selector none is picked, with an empty one all are.
async fn of_signer(
    objects: &Objects,
    signer: &str,
    source: &ClusterTrustBundleProjection,
) -> Result<Vec<ClusterTrustBundle>, TrustBundleError> {
    let Some(selector) = source.label_selector.clone() else { return Ok(Vec::new()) };
    let selector = Selector::try_from(selector).map_err(TrustBundleError::Selector)?;
    let params = ListParams::default().fields(&format!("spec.signerName={signer}")).labels_from(&selector);
    let list = Api::<ClusterTrustBundle>::all(objects.client()).list(&params).await;
    list.map(|list| list.items)
        .map_err(|source| TrustBundleError::List { signer: signer.to_owned(), source: Box::new(source) })
}

fn anchors(bundles: &[ClusterTrustBundle]) -> Result<String, TrustBundleError> {
    let mut anchors = BTreeSet::new();
    for bundle in bundles {
        let name = || bundle.metadata.name.clone().unwrap_or_default();
        let found = pem::certificates(&bundle.spec.trust_bundle)
            .map_err(|source| TrustBundleError::Certificate { name: name(), source })?;
        anchors.extend(found);
    }
    Ok(pem::encode(&anchors))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_anchor_once() {
        let bundle = |anchors: &[Vec<u8>]| {
            let mut bundle = ClusterTrustBundle::default();
            bundle.spec.trust_bundle = format!("# ours\n{}", pem::encode(anchors));
            bundle
        };
        let (a, b, c) = (vec![1], vec![2], vec![3]);
        let text = anchors(&[bundle(&[b.clone(), a.clone()]), bundle(&[c.clone(), b.clone()])]).unwrap();
        assert_eq!(pem::certificates(&text).unwrap(), [a, b, c]);
    }
}
