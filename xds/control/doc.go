// Package control is ztun's embedded control plane: workloads, services and
// policies over delta ADS, and a certificate authority, from a directory of
// ordinary Kubernetes and Istio YAML. It speaks what istiod speaks, so that a
// proxy cannot tell the two apart.
//
// A directory is used whole or not at all. Objects mean something only
// together: a Namespace's label enrols the pods of another file, a selector in
// a third one decides who may reach them. Leaving out the one object that has
// a typing error could open what the user had closed, so a directory with any
// problem changes nothing: every problem is named with file, line and field,
// and the last good state stays in force. Before the first good state nothing
// is answered, because an empty answer would tell a reconnecting proxy that
// the mesh is gone.
//
// It has no kubelet and no scheduler behind it. spec.nodeName places a pod,
// status.podIPs (or the annotation ztun.io/pod-ips) addresses it, and a pod
// counts as ready unless its status says otherwise.
//
//	srv, err := control.New(control.Config{Dir: "mesh/", State: "state/"})
//	...
//	err = srv.Serve(ctx, listener)
//
// A Server may be used from any goroutine. A World is immutable.
package control
