// Package soak holds meshes under a mixed load for minutes and looks for what
// only time and bad networks show: a stall, a byte that is lost, doubled or on
// the wrong connection, an end that never comes, and leaks.
//
//	make soak                          20 minutes
//	make soak MINUTES=2 SEED=7         shorter, and the load of an earlier run again
//	go test ./cmd/internal/soak        every kind of connection once, in half a minute
//
// It is a test, since the meshes it runs on are those of the tests
// (cmd/internal/meshtest): two nodes with real proxies in namespaces, whose
// packets cross a tuntest.Wire on TUN devices while the apps are kernel sockets;
// the same without a wire, where a round trip takes microseconds; and two stacks
// in memory. An epoch is one world, one weather of the wire, and a load that the
// seed draws: scripts, one for each connection, that say what either end sends,
// reads, waits for, and how it ends. When an epoch's load has ended, memory,
// goroutines, descriptors and flows must be back where they were.
//
// The load is drawn from the seed; when its packets go is up to the machine.
// A run with the same seed asks the same things in the same order, no more.
package soak
