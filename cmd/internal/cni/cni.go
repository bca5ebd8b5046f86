// Package cni makes the node's container runtime ask the agent about each new
// pod before anything in it runs.
//
// Installer puts the plugin ztun-cni into the runtime's folder and at the end
// of the runtime's chain of plugins, keeps both there while others rewrite
// them, and takes them away again. Server hears the plugin, and answers when the
// pod is captured, or need not be. Who decides that is an Enroller.
//
//	in, err := cni.NewInstaller(cni.Config{BinDir: "/host/opt/cni/bin", NetDir: "/host/etc/cni/net.d", ...})
//	go in.Run(ctx)
//	err = cni.NewServer("/var/run/istio-cni/pluginevent.sock", enroller, log).Run(ctx)
//
// It does not know Kubernetes, and does not touch a pod. An Installer and a
// Server may be asked for their state from any goroutine.
package cni

import (
	"context"
	"net/netip"
)

// Request is what the plugin was told of a new pod.
type Request struct {
	// Netns is the path of the pod's network namespace on the host.
	Netns string
	// PodUID is empty where the runtime does not tell it.
	PodName, PodNamespace, PodUID string
	// IPs are what the chain of plugins gave to the pod, with their prefixes.
	IPs []netip.Prefix
}

// An Enroller decides and acts: nil says that the pod is captured, or not in
// the mesh.
type Enroller interface {
	Enrol(ctx context.Context, r Request) error
}
