//! A client of the node that the arguments name.

use crate::arguments::NodeArguments;
use crate::failure::{Failure, Kind};
use kvar_base::NamespaceKey;
use kvar_client::{CallOptions, Client, ClientConfig, ClientError};
use kvar_node::KeyFile;
use std::time::Duration;

/// Longest time for connecting: long enough for a node that is busy, short for a typing person.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A connected client, and the key that names blocks.
pub(crate) struct Connected {
    pub(crate) client: Client,
    pub(crate) key: NamespaceKey,
    pub(crate) options: CallOptions,
}

/// Reads the key and connects.
pub(crate) fn connect(node: &NodeArguments) -> Result<Connected, Failure> {
    let KeyFile { key, namespace, .. } =
        KeyFile::read(&node.key.key_file).map_err(Failure::usage)?;
    let mut config = ClientConfig {
        deadline: node.deadline,
        link: node.link,
        connect_timeout: CONNECT_TIMEOUT,
        name: concat!("kvar ", env!("CARGO_PKG_VERSION")).to_owned(),
        ..ClientConfig::new(&node.endpoint, key.clone())
    };
    if let Some(whose) = namespace {
        config.namespace = whose.name;
    }
    let client = Client::connect(config).map_err(failure)?;
    Ok(Connected {
        client,
        key,
        options: CallOptions::within(node.deadline),
    })
}

/// A client's error as a command's failure.
pub(crate) fn failure(error: ClientError) -> Failure {
    match &error {
        ClientError::Config(_) => Failure::usage(error),
        ClientError::Unreachable(_) => Failure::failed(format!(
            "{error}; is a node running there (kvar serve), and is --endpoint right?"
        )),
        ClientError::WrongKey(_) => Failure::new(
            Kind::Failed,
            format!("{error} (--key-file or KVAR_KEY_FILE)"),
        ),
        _ => Failure::failed(error),
    }
}
