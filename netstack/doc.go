// Package netstack terminates the TCP of pods in gVisor stacks.
package netstack
