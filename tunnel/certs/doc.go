// Package certs holds a workload's certificate over its life: a Manager
// fetches one for each identity it is asked for, renews it at half of its
// life, and keeps the old one while that is valid; a Certificate is an
// immutable snapshot that makes the TLS configurations to dial and to accept.
// IstioCA is the CA client. Nothing else gets certificates, and no private key
// leaves the process or reaches a log. Revocations are the peers' certificates
// that count no more: handshakes ask them, and whoever owns a live connection asks
// again, with its Proof, when they change.
//
//	ca, err := certs.NewIstioCA(certs.IstioCAConfig{Address: "https://istiod.istio-system.svc:15012", ...})
//	m := certs.NewManager(certs.Config{CA: ca})
//	go m.Run(ctx)
//	m.Prefetch(id)                             // a pod of this identity runs here
//	cert, err := m.Get(ctx, id, certs.RealTime) // a connection waits for it
//	conn := tls.Client(raw, cert.ClientTLS(expected))
//
// A Manager counts no users: whoever knows the pods of this node calls Forget
// when the last one with an identity is gone.
//
// Everything here may be called from any goroutine. On a splice.Loop only
// Manager.Current, Prefetch and Forget, and the methods of Certificate, may be
// called: they hold a lock for a moment, and never wait.
package certs
