// Package tunnel is the one place that decides. Every edge of a pod turns bytes
// into a question that is accepted or refused exactly once: a SYN from the app,
// a plaintext SYN from the network, a CONNECT from a peer. A Pod answers them
// from an immutable snapshot of the mesh, joins what it accepted, watches over
// it while it lives, and hands one Record of it to a Recorder.
//
// # Neighbours
//
// A stream between two pods of one process needs neither TLS nor HTTP/2, nor
// TCP between their stacks. Where a tunnel would be asked for, outbound.visit
// looks for the destination among Neighbours, and if it is there posts a visit
// to its loop: a CONNECT in memory. Pod.connected answers it as it answers a
// peer's, with the same checks in the same order, the same record, and the
// status and Proxy-Status that a peer would have sent; connectReason reads
// them as if they had come so. Once the app has accepted, a splice.Pipe joins
// the two loops, and a Join on either side knows no difference.
//
// A visit stands where a CONNECT on an open tunnel stands: what the wire proves
// before must hold already. Each side has a live certificate for its identity,
// each certificate would be taken in a handshake with the other (certs.Agree,
// once for each pair of certificates), the route allows the host's identity, and
// the host, which knows best, is the workload that is meant, at that address.
// Where one of these does not hold the host declines and the wire is taken, with
// its own waits and its own errors: there is no second table of them. So a CA
// that is down, a rotation to other roots, a reused address, a pod that drains
// mean the same on both ways. What the network does to packets between the pods
// is the one difference: a NetworkPolicy is not asked.
//
// # Concurrency
//
// Everything of one Pod runs on its Stack's Loop: no locks, nothing blocks.
// What can block (a certificate, a handshake) runs on a goroutine that posts
// its result back. Only the methods that say so may be called from elsewhere.
package tunnel
