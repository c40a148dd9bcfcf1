//! The names of one environment, and the answer to one question. Pure.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::types::{EnvironmentNetwork, Subnet};

/// How long an answer may be kept, in seconds: about as long as a new container may stay unnoticed.
const TTL_S: u32 = 5;
/// What we take and give over UDP where the asker speaks EDNS, in bytes: fits any path without fragments.
const MAX_UDP_ANSWER_BYTES: u16 = 1232;

/// Names and addresses of one environment; lower case, without a dot at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NameTable {
    domain: String,
    subnet: Subnet,
    addresses: HashMap<String, Vec<Ipv4Addr>>,
    names: HashMap<Ipv4Addr, String>,
}

/// What to do with a question.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Ours: this is the answer.
    Answer(Box<Message>),
    /// Not ours: ask a resolver.
    Elsewhere,
}

impl NameTable {
    pub(crate) fn new(environment: &EnvironmentNetwork) -> Self {
        let mut addresses: HashMap<String, Vec<Ipv4Addr>> = HashMap::new();
        let mut names = HashMap::new();
        for endpoint in &environment.endpoints {
            for name in endpoint.names.iter().map(|name| plain(name)) {
                names.entry(endpoint.address).or_insert_with(|| name.clone());
                addresses.entry(name).or_default().push(endpoint.address);
            }
        }
        for list in addresses.values_mut() {
            list.sort_unstable();
            list.dedup();
        }
        Self { domain: plain(&environment.domain), subnet: environment.subnet, addresses, names }
    }

    /// Answers `request` if it is about a name of this environment. `turn` rotates the addresses of a name that has
    /// several, so that successive askers start at different ones.
    pub(crate) fn answer(&self, request: &Message, turn: usize) -> Verdict {
        let mut reply = reply_to(request);
        if request.metadata.message_type != MessageType::Query || request.metadata.op_code != OpCode::Query {
            return refuse(reply, ResponseCode::NotImp);
        }
        let [question] = request.queries.as_slice() else { return refuse(reply, ResponseCode::FormErr) };
        if question.query_class() != DNSClass::IN {
            return Verdict::Elsewhere;
        }
        let asked = plain(&question.name().to_ascii());
        if let Some(address) = reverse(&asked).filter(|address| self.subnet.contains(*address)) {
            return self.answer_reverse(reply, question, address);
        }
        let suffix = if self.domain.is_empty() { None } else { asked.strip_suffix(self.domain.as_str()) };
        let inside = suffix.and_then(|rest| if rest.is_empty() { Some(rest) } else { rest.strip_suffix('.') });
        let Some(list) = self.addresses.get(inside.unwrap_or(&asked)) else {
            return match inside {
                Some("") => finish(reply),
                Some(_) => refuse(reply, ResponseCode::NXDomain),
                None => Verdict::Elsewhere,
            };
        };
        // A name that exists but not with this type, AAAA above all, is answered with nothing, not with "no such name".
        if matches!(question.query_type(), RecordType::A | RecordType::ANY) {
            let mut rotated = list.clone();
            rotated.rotate_left(turn % list.len().max(1));
            let record = |address| Record::from_rdata(question.name().clone(), TTL_S, RData::A(A(address)));
            reply.answers.extend(rotated.into_iter().map(record));
        }
        finish(reply)
    }

    fn answer_reverse(&self, mut reply: Message, question: &Query, address: Ipv4Addr) -> Verdict {
        let Some(name) = self.names.get(&address) else { return refuse(reply, ResponseCode::NXDomain) };
        let full = if self.domain.is_empty() { format!("{name}.") } else { format!("{name}.{}.", self.domain) };
        if let (RecordType::PTR, Ok(name)) = (question.query_type(), Name::from_ascii(&full)) {
            reply.answers.push(Record::from_rdata(question.name().clone(), TTL_S, RData::PTR(PTR(name))));
        }
        finish(reply)
    }
}

/// The reply to `request` without any record yet.
pub(crate) fn reply_to(request: &Message) -> Message {
    let mut reply = Message::response(request.metadata.id, request.metadata.op_code);
    reply.metadata.recursion_desired = request.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.queries = request.queries.clone();
    if request.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP_ANSWER_BYTES);
        reply.edns = Some(edns);
    }
    reply
}

/// The reply that says we could not find out.
pub(crate) fn failure(request: &Message) -> Message {
    let mut reply = reply_to(request);
    reply.metadata.response_code = ResponseCode::ServFail;
    reply
}

/// The wire form for UDP; an answer that does not fit is cut and marked, so that the asker comes back over TCP.
pub(crate) fn to_udp(request: &Message, reply: &Message) -> Option<Vec<u8>> {
    let limit = request.max_payload().min(MAX_UDP_ANSWER_BYTES);
    let bytes = reply.to_vec().ok()?;
    if bytes.len() <= usize::from(limit) { Some(bytes) } else { reply.truncate().to_vec().ok() }
}

fn finish(mut reply: Message) -> Verdict {
    reply.metadata.authoritative = true;
    Verdict::Answer(Box::new(reply))
}

fn refuse(mut reply: Message, code: ResponseCode) -> Verdict {
    reply.metadata.response_code = code;
    finish(reply)
}

fn plain(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

/// `4.3.2.1.in-addr.arpa` is the question about 1.2.3.4 (RFC 1035 section 3.5).
fn reverse(name: &str) -> Option<Ipv4Addr> {
    let mut labels = name.strip_suffix(".in-addr.arpa")?.split('.');
    let mut octets = [0; 4];
    for octet in octets.iter_mut().rev() {
        *octet = labels.next()?.parse().ok()?;
    }
    labels.next().is_none().then(|| octets.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{Endpoint, Location, Mac};

    fn table() -> NameTable {
        let endpoint = |last: u8, names: &[&str]| Endpoint {
            mac: Mac([2, 0, 0, 0, 0, last]),
            address: Ipv4Addr::new(10, 1, 0, last),
            at: Location::Local,
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        NameTable::new(&EnvironmentNetwork {
            vni: 1,
            subnet: Subnet::new(Ipv4Addr::new(10, 1, 0, 0), 20).unwrap(),
            gateway: Ipv4Addr::new(10, 1, 0, 1),
            host_address: Ipv4Addr::new(10, 1, 0, 2),
            mtu: 1450,
            domain: "Shop.internal".into(),
            remotes: vec![],
            endpoints: vec![endpoint(10, &["db-1", "db"]), endpoint(11, &["db-2", "DB"]), endpoint(12, &["web-1"])],
            ports: vec![],
        })
    }

    fn ask(name: &str, kind: RecordType, turn: usize) -> Verdict {
        let mut request = Message::query();
        request.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        table().answer(&request, turn)
    }

    fn addresses(name: &str, turn: usize) -> Vec<u8> {
        let Verdict::Answer(reply) = ask(name, RecordType::A, turn) else { panic!("{name} was not ours") };
        let last = |record: &Record| match &record.data {
            RData::A(A(address)) => address.octets()[3],
            other => panic!("{other:?}"),
        };
        reply.answers.iter().map(last).collect()
    }

    proptest::proptest! {
        /// Whatever a container asks: it gets an answer that can be sent, or its question goes on.
        #[test]
        fn no_question_is_too_strange(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
            changes in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), proptest::prelude::any::<u8>()), 0..6),
        ) {
            let mut damaged = Message::query();
            damaged.add_query(Query::query(Name::from_ascii("db.shop.internal.").unwrap(), RecordType::A));
            let mut damaged = damaged.to_vec().unwrap();
            for (at, value) in changes {
                let at = at.index(damaged.len());
                damaged[at] = value;
            }
            for bytes in [bytes, damaged] {
                if let Ok(request) = Message::from_vec(&bytes)
                    && let Verdict::Answer(reply) = table().answer(&request, 1)
                {
                    assert!(reply.to_vec().is_ok(), "{request:?}");
                }
            }
        }
    }

    #[test]
    fn names_bare_and_full_in_any_case_and_in_turn() {
        assert_eq!(addresses("db-1.", 0), [10]);
        assert_eq!(addresses("dB.", 0), [10, 11]);
        assert_eq!(addresses("db.sHOP.internal.", 1), [11, 10]);
    }

    #[test]
    fn other_types_get_no_data_and_unknown_names_their_due() {
        let code = |verdict| match verdict {
            Verdict::Answer(reply) => (reply.metadata.response_code, reply.answers.len()),
            Verdict::Elsewhere => (ResponseCode::BADKEY, 0),
        };
        assert_eq!(code(ask("db.", RecordType::AAAA, 0)), (ResponseCode::NoError, 0));
        assert_eq!(code(ask("nobody.shop.internal.", RecordType::A, 0)), (ResponseCode::NXDomain, 0));
        assert_eq!(code(ask("example.org.", RecordType::A, 0)), (ResponseCode::BADKEY, 0));
        assert_eq!(code(ask("workshop.internal.", RecordType::A, 0)), (ResponseCode::BADKEY, 0));
        assert_eq!(code(ask("11.0.1.10.in-addr.arpa.", RecordType::PTR, 0)), (ResponseCode::NoError, 1));
        assert_eq!(code(ask("99.0.1.10.in-addr.arpa.", RecordType::PTR, 0)), (ResponseCode::NXDomain, 0));
        assert_eq!(code(ask("1.2.3.4.in-addr.arpa.", RecordType::PTR, 0)), (ResponseCode::BADKEY, 0));
    }
}
