// Package e2e proves ztun on a real cluster: two nodes with kubelet, containerd
// and kube-proxy, an unmodified istiod, and the chart of deploy/chart, all in
// namespaces of this machine that vanish with the run. `make e2e` runs it.
//
// The cases are ordinary Go tests, so -run selects them; TestMain brings the
// cluster up before them and prints a table of case, result and time after
// them. Nothing of this module is in the product's go.mod.
package e2e
