"""Bounds of the DHT. Those of Kademlia's design stand first, the rest was chosen."""

from __future__ import annotations

# --- Kademlia, with SHA-256 ids ---
ID_BYTES = 32
ID_BITS = 256
KSIZE = 20
SPLIT_EVERY = 5
"""Buckets outside our own range are split until their depth is a multiple of this (Kademlia, section 4.2)."""

# --- records ---
KEY_BYTES_MAX = 128
SUBKEY_BYTES_MAX = 128
VALUE_BYTES_MAX = 16 << 10
TTL_S_MAX = 3600
SEQUENCE_MAX = 2**63 - 1
RECORD_BYTES_MAX = VALUE_BYTES_MAX + 1024

RECORDS_CACHED = 4096
CACHED_RECORD_BYTES_MAX = 2 << 10
"""Read forms of records that are kept, of those that aren't longer: at most 20 MB, a few in a usual swarm."""

# --- what a holder keeps ---
RECORDS_PER_KEY_MAX = 2048
BYTES_PER_KEY_MAX = 4 << 20
"""Two thousand servers of a model, each with a record of a kilobyte, under one of its keys: and no key takes a tenth of the store."""
RECORDS_PER_PUBLISHER_MAX = 1024
RECORDS_PER_KEY_AND_PUBLISHER_MAX = 16
"""A server has one under a model's keys, and one for each of its models under the key of manifests."""
STORE_BYTES_MAX = 64 << 20
RECORD_OVERHEAD_BYTES = 512
"""Counted for each record on top of its fields: what Python needs to hold it."""
STORES_PER_PEER_PER_MINUTE = 100
PEERS_RATED_MAX = 4096

# --- what we publish ---
SHORT_LIVED_S = 120
COPIES_OF_SHORT_LIVED = 10
"""Of a record that lives no longer: it is renewed each half of its life, and needn't outlast the leaving of its holders as others do."""
PUBLISHED_MAX = 512
REPUBLISH_RETRY_S = 5.0
"""When nobody took a record."""

# --- the table ---
CONTACTS_PER_GROUP_AND_BUCKET = 2
CONTACTS_PER_GROUP = 10
BUCKETS_MAX = 512
ADDRESSES_PER_CONTACT = 8
ADDRESS_BYTES_MAX = 300
"""Longer ones are not passed on: k contacts with all their addresses must fit a message's header."""
CONSIDERED_AT_ONCE = 16
CONTACTS_CACHED = 16384
"""Read forms of contacts that are kept."""
REFUSED_REMEMBERED_S = 30.0
REFUSED_REMEMBERED_MAX = 1024
FAILURES_MAX = 2
"""A contact leaves the table after so many unanswered requests in a row (at once when it can't be dialled)."""

# --- lookups ---
ALPHA = 5
LOOKUP_RPCS_MAX = 200
LOOKUP_S = 10.0
PATIENCE_S = 1.0
"""A request that takes longer holds nobody up any more: others are asked in its place, and its answer still counts if it comes."""
PATIENCE_MIN_S = 0.3
PATIENCE_MAX_S = 1.5
PATIENCE_TIMES_MEDIAN = 3.0
"""Once `PATIENCE_SAMPLES` answers of a lookup have come, its patience follows from how long they took."""
PATIENCE_SAMPLES = 3
CANDIDATES_MAX = 400
CORRECTED_HOLDERS_MAX = 3
CORRECTED_RECORDS_MAX = 16
FOREIGN_CHECKS_AT_ONCE = 8

# --- calls ---
LIFE_BYTES = 8
CURSOR_BYTES_MAX = 32
PAGE_RECORDS = 256
PAGE_BYTES = 256 << 10
"""Of records in one answer, or a single one: a tenth of a second of a home's uplink. What is left follows when it is asked for."""
PAGES_MAX = 16
"""Of one holder, in one go."""
FINGERPRINT_BYTES = 8
"""Of a record's signature: what an asker says of the records that it knows already."""
LACKS_TOLD_MAX = 16
ANSWER_RECORDS_MAX = 768
"""Of peers that know no pages."""
MESSAGE_BYTES_MAX = 256 * RECORD_BYTES_MAX + (64 << 10)
STORE_RECORDS_MAX = 100
RPC_TIMEOUT_MIN_S = 1.0
"""Added to three round trips: either side may do nothing for half a second, with processors as busy as a swarm's are."""
RPC_TIMEOUT_MAX_S = 2.0
RPC_DIAL_TIMEOUT_S = 3.0

# --- answers under way ---
LONG_ANSWER_BYTES = 8 << 10
"""Shorter ones always go, and nobody looks whether they arrive."""
UNDER_WAY_BYTES = 512 << 10
"""Of long answers: eight tenths of a second of an uplink of 5 Mbit/s ..."""
UNDER_WAY_S = 0.75
"""... or what arrives within so long, where that is more: askers ask somebody else after a second."""
ARRIVED_LATELY_S = 1.0
ARRIVES_BYTES_PER_S = 512e3
"""That much is taken to arrive before anything did."""
LONG_ANSWERS_MAX = 24
"""Each keeps a connection."""
LONG_ANSWERS_PER_ASKER = 6
"""A peer, or all of one address group."""
LONG_ANSWER_EVERY_S = 0.5
"""One goes after so long without any, whatever is under way: askers that never take their answers silence nobody. By that there are
at most `UNDER_WAY_LIFE_S` / `LONG_ANSWER_EVERY_S` more."""
ANSWER_LIFE_S = RPC_DIAL_TIMEOUT_S
"""Nobody waits longer for an answer: what is left of it then isn't sent."""
UNDER_WAY_LIFE_S = 10.0
"""An answer counts for so long at most."""
LATER_MIN_S = 0.5
LATER_MAX_S = 2.0
"""A holder that has no room for an answer says when to ask again, within these; an asker waits twice as long each time in a row."""
LATER_WAITED_S = 4.0
"""Where somebody answered, but knew nothing, those that said later are waited for so long: three more questions to each."""

# --- upkeep ---
UPKEEP_S = 1.0
"""The least between two looks at what is due."""
SELF_LOOKUP_S = 300.0
SELF_LOOKUP_MAX_S = 1800.0
"""A neighbourhood that stays the same is looked at half as often each time."""
SELF_LOOKUP_LONELY_S = 10.0
"""While the table holds fewer than `KSIZE` contacts."""
REFRESH_S = 3600.0
"""Each part of the id space, seen from us, is looked into this often (Kademlia, section 2.3), and once after joining."""
REFRESH_GAP_S = 10.0
"""Between two such looks: a node that has just joined fills its table in the first minutes, not in the first seconds."""
CONTACTS_ENOUGH = 5
"""A part that holds so many already needs no look after joining: others have come by themselves."""
REFRESH_RPCS_MAX = 3
"""Such a look wants contacts there, not the closest."""
CONTACT_FRESH_S = 900.0
"""A contact that was heard of within this time keeps its place in a full bucket without being asked."""
REMEMBERED_MAX = 64
LOST_MAX = 64
LOST_RETRY_S = 60.0
LOST_RETRIES = 2
"""Contacts that vanished are tried again, so many at a time: it may have been the network that broke in two."""

# --- neighbourhoods of keys, and keys that are followed ---
LOCATED_S = 300.0
"""The nodes nearest to a key are asked, and offered renewals, without looking for nearer ones, for so long."""
LOCATED_LONELY_S = 30.0
"""Where there were fewer than `KSIZE` of them."""
RELOCATE_S = 20.0
"""The least between two lookups of one neighbourhood, however often it seems to have changed."""
CHANGED_SHARE = 4
"""It has when a quarter of the `NEAR` nearest, or of all members where they are fewer, are strangers."""
ANSWERED_S = 60.0
"""A member that answered within this time isn't asked again when its neighbourhood is looked for anew, ..."""
ASKED_AGAIN = 3
"""... but so many of the nearest: they name all that are near, and not only the nearest `NEAR`."""
THOROUGH_S = 10.0
"""A neighbourhood that was looked for so lately isn't looked for again, even where blocks seem to be missing."""
NEIGHBOURHOODS_MAX = 1024
NEAR = 5
"""So many nodes a known holder names: one among them that nobody named before shows that the neighbourhood changed."""
LOCATED_HOLDERS = 10
"""So many of the nodes nearest to a key a reader looks for, and takes its few from: half of `KSIZE`, as a lookup asks."""
READ_HOLDERS = 4
READ_HOLDERS_THOROUGH = 10
"""Where blocks seem to be missing."""
AT_ONCE_RECORDS_MAX = 64
"""With more records under a key than these, one holder is asked first, and the others for what that one didn't tell ..."""
MUCH_TOLD_RECORDS = 16
"""... one after the other, as long as each tells so many: holders lack much in a network that grows, and each would tell all of it."""
ROTATE_S = 60.0
"""So often another holder takes the place of one that is read: none can hide a record for long."""
CORRECTED_AFTER_S = 10.0
"""A record younger than this may still be on its way to a holder that lacks it."""
