// Package hbone says what a CONNECT between two workloads means: TLS with
// SPIFFE identities over a non-blocking end, the request's headers and the
// answer's, a Pool of tunnels on the client's side and a Server on the other.
//
// It decides nothing: who is allowed, and where a connection goes, is asked
// of the caller. Frames are package h2's business, certificates package certs'.
//
// Everything but a TLS handshake runs on one splice.Loop and is called there
// only. A handshake runs on a goroutine of Handshakes and posts its result.
package hbone
