"""HTTP: authentication, fields of replies, and Lockstep's own API."""
