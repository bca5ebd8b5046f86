// Package tunnel is the one place that decides. Every edge of a pod turns bytes
// into a question that is accepted or refused exactly once: a SYN from the app,
// a plaintext SYN from the network, a CONNECT from a peer. A Pod answers them
// from an immutable snapshot of the mesh, joins what it accepted, watches over
// it while it lives, and hands one Record of it to a Recorder.
//
// Everything of one Pod runs on its Stack's Loop: no locks, nothing blocks.
// What can block (a certificate, a handshake) runs on a goroutine that posts
// its result back. Only the methods that say so may be called from elsewhere.
package tunnel
