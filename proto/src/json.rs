//! Messages in JSON.

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

use crate::DESCRIPTORS;

static POOL: LazyLock<Option<DescriptorPool>> = LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).ok());

/// The message `strata.v1.NAME` in protobuf's JSON: fields by their names in the `.proto` file, all of them, and numbers as
/// numbers. `null` if clients know no such message.
pub fn json<M: Message>(name: &str, message: &M) -> String {
    let descriptor = POOL.as_ref().and_then(|pool| pool.get_message_by_name(&format!("strata.v1.{name}")));
    let dynamic =
        descriptor.and_then(|of| DynamicMessage::decode(of, message.encode_to_vec().as_slice()).ok());
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .skip_default_fields(false)
        .stringify_64_bit_integers(false);
    let value = dynamic.and_then(|m| m.serialize_with_options(serde_json::value::Serializer, &options).ok());
    value.unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;

    #[test]
    fn a_message_has_all_its_fields_by_their_names() {
        let member = v1::Member { worker: "a".into(), live: true, ..v1::Member::default() };
        let expected = r#"{"worker":"a","live":true,"devices":[],"reason":"","drained":false}"#;
        assert_eq!(json("Member", &member), expected);
        let requests = v1::Requests { begun: u64::from(u32::MAX) + 1, ..v1::Requests::default() };
        assert!(json("Requests", &requests).starts_with(r#"{"begun":4294967296,"#));
        assert_eq!(json("NoSuchMessage", &member), "null");
    }
}
