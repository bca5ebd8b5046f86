package xds

import (
	"fmt"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"
)

// A Node says to the control plane who asks.
type Node struct {
	PodName   string
	Namespace string
	IP        string // INSTANCE_IP.
	NodeName  string
	// Metadata is added as strings, then JSON with its own types; a later one
	// replaces an earlier one of the same name. JSON values are as
	// encoding/json decodes them into an any.
	Metadata map[string]string
	JSON     map[string]any
}

// ID is the node id; its domain is always cluster.local.
func (n *Node) ID() string {
	return fmt.Sprintf("ztunnel~%s~%s.%s~%s.svc.cluster.local", n.IP, n.PodName, n.Namespace, n.Namespace)
}

func (n *Node) proto() (*corev3.Node, error) {
	fields := map[string]*structpb.Value{
		"NAME":         structpb.NewStringValue(n.PodName),
		"NAMESPACE":    structpb.NewStringValue(n.Namespace),
		"INSTANCE_IPS": structpb.NewStringValue(n.IP),
		"NODE_NAME":    structpb.NewStringValue(n.NodeName),
	}
	for k, v := range n.Metadata {
		fields[k] = structpb.NewStringValue(v)
	}
	for k, v := range n.JSON {
		value, err := structpb.NewValue(v)
		if err != nil {
			return nil, fmt.Errorf("node metadata %s: %w", k, err)
		}
		fields[k] = value
	}
	return &corev3.Node{Id: n.ID(), Metadata: &structpb.Struct{Fields: fields}}, nil
}
