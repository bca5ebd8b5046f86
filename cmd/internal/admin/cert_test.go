package admin

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"strings"
	"testing"
)

// parse reads the first certificate of a golden list. Its PEM says "CERTIFICATE"
// in 60-column base64 of DER; the test data may have lost the type.
func parse(t *testing.T, list any) *x509.Certificate {
	t.Helper()
	text, err := base64.StdEncoding.DecodeString(list.([]any)[0].(map[string]any)["pem"].(string))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		der, err := base64.StdEncoding.DecodeString(strings.Join(lines[1:len(lines)-1], ""))
		if err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		block = &pem.Block{Bytes: der}
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
