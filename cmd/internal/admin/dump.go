package admin

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"slices"
	"time"

	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/xds/authz"
	"github.com/ztun/ztun/xds/mesh"
)

// A Dump is what /config_dump shows, as istioctl reads it.
type Dump struct {
	Certificates   []CertificateDump        `json:"certificates"`
	Config         any                      `json:"config"`
	Policies       []*authz.Policy          `json:"policies"`
	Services       []mesh.ServiceDump       `json:"services"`
	StagedServices any                      `json:"stagedServices"`
	StaticConfig   staticConfig             `json:"staticConfig"`
	Version        any                      `json:"version"`
	WorkloadState  map[string]WorkloadState `json:"workloadState"`
	Workloads      []*mesh.Workload         `json:"workloads"`
}

// staticConfig is ztunnel's local configuration, which ztun does not have.
type staticConfig struct {
	Policies  []struct{} `json:"policies"`
	Services  []struct{} `json:"services"`
	Workloads []struct{} `json:"workloads"`
}

// NewDump puts a dump together. Parts that are nil are shown as empty.
func NewDump(config, version any, m *mesh.Dump, cs []certs.Status, pods map[string]WorkloadState) *Dump {
	d := &Dump{
		Config: config, Version: version, WorkloadState: pods,
		Policies: m.Policies, Services: m.Services, StagedServices: m.StagedServices, Workloads: m.Workloads,
		StaticConfig: staticConfig{Policies: []struct{}{}, Services: []struct{}{}, Workloads: []struct{}{}},
		Certificates: []CertificateDump{},
	}
	for _, s := range cs {
		d.Certificates = append(d.Certificates, certificateDump(s))
	}
	if d.WorkloadState == nil {
		d.WorkloadState = map[string]WorkloadState{}
	}
	return d
}

// CertificateDump is an identity's certificate without its key.
type CertificateDump struct {
	CertChain []X509Dump `json:"certChain"`
	Identity  string     `json:"identity"`
	RootCerts []X509Dump `json:"rootCerts"`
	State     string     `json:"state"`
}

// X509Dump is one certificate.
type X509Dump struct {
	ExpirationTime string `json:"expirationTime"`
	PEM            string `json:"pem"` // base64 of the PEM text
	SerialNumber   string `json:"serialNumber"`
	ValidFrom      string `json:"validFrom"`
}

func certificateDump(s certs.Status) CertificateDump {
	d := CertificateDump{Identity: s.ID.String(), State: s.State, CertChain: []X509Dump{}, RootCerts: []X509Dump{}}
	if s.Cert != nil {
		d.CertChain = x509Dumps(s.Cert.Chain)
		d.RootCerts = x509Dumps(s.Cert.Roots)
	}
	return d
}

func x509Dumps(list []*x509.Certificate) []X509Dump {
	out := make([]X509Dump, 0, len(list))
	for _, c := range list {
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
		out = append(out, X509Dump{
			ExpirationTime: c.NotAfter.UTC().Format(time.RFC3339),
			PEM:            base64.StdEncoding.EncodeToString(text),
			SerialNumber:   c.SerialNumber.String(),
			ValidFrom:      c.NotBefore.UTC().Format(time.RFC3339),
		})
	}
	return out
}

// WorkloadState is a pod as the proxy serves it.
type WorkloadState struct {
	Connections *Connections `json:"connections,omitempty"` // Only while Up.
	Info        WorkloadInfo `json:"info"`
	State       string       `json:"state"` // "Pending" or "Up".
}

// WorkloadInfo is what the agent said of the pod.
type WorkloadInfo struct {
	Name           string `json:"name"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

// Connections are those that are open.
type Connections struct {
	Inbound  []ConnectionDump `json:"inbound"`
	Outbound []ConnectionDump `json:"outbound"`
}

// ConnectionDump is one of them.
type ConnectionDump struct {
	ActualDst   string  `json:"actualDst"`
	OriginalDst *string `json:"originalDst"`
	Protocol    string  `json:"protocol"`
	Src         string  `json:"src"`
	Path        string  `json:"path,omitempty"` // Ours: "same-node" if it stays in this process.
}

// DumpConnections sorts live connections into their directions.
func DumpConnections(live []tunnel.Live) *Connections {
	c := &Connections{Inbound: []ConnectionDump{}, Outbound: []ConnectionDump{}}
	slices.SortFunc(live, func(a, b tunnel.Live) int { return a.Start.Compare(b.Start) })
	for i := range live {
		l := &live[i]
		d := ConnectionDump{Src: l.Src.String(), ActualDst: l.Dst.String(), Protocol: "TCP"}
		target := l.HBONEAddr
		if target != "" {
			d.Protocol = "HBONE"
		}
		if l.SameNode {
			d.Path = "same-node"
		}
		if l.Direction == tunnel.Inbound {
			if target != "" {
				d.ActualDst = target // Dst is the pod's tunnel port.
			}
			c.Inbound = append(c.Inbound, d)
			continue
		}
		if target == "" {
			target = d.ActualDst
		}
		d.OriginalDst = &target
		c.Outbound = append(c.Outbound, d)
	}
	return c
}
